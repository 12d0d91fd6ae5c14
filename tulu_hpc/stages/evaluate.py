"""Evaluation: greedy and sampled answers to the tasks of a suite, scored and written with intervals.

`run(config)` answers the development suite only. The unseen suite is run by `run(config, unseen=True)`, and every such
run leaves a line in `{run.root}/unseen_runs.jsonl`: a set that is looked at often is not unseen any more.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import tulu_hpc
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import EvalConfig, EvalTaskSection
from tulu_hpc.data.chat_template import ChatTemplate
from tulu_hpc.evaluation.runner import Answer, LoadedTask, RunOptions, answer_tasks, load_task, summarise
from tulu_hpc.evaluation.suites import dev_task, unseen_task
from tulu_hpc.evaluation.tasks import EvalTask
from tulu_hpc.parallel.failures import shared_writing
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.stages.model_source import OpenModel, open_model
from tulu_hpc.stages.rollouts import (
    describe_lost,
    import_verifiers,
    lost_verdicts,
    open_verifiers,
    sampling_of,
    verify_in_replica,
)
from tulu_hpc.stages.served_model import ServedModel, open_model_engine
from tulu_hpc.telemetry.files import write_atomically
from tulu_hpc.verifiers.sandbox import VerifierPool

UNSEEN_LOG = "unseen_runs.jsonl"


def run(config: EvalConfig, unseen: bool = False) -> list[Path]:
    """Evaluate `model.path` on one suite; returns the result file, `{eval.output}/dev.json` or `unseen.json`.

    Raises:
        ConfigError, EvalError: naming the key, or file and line.
    """
    return run_suites(config, ["unseen" if unseen else "dev"])


def run_both(config: EvalConfig) -> list[Path]:
    """The development and then the unseen suite with the model loaded once; returns both result files."""
    return run_suites(config, ["dev", "unseen"])


def run_suites(config: EvalConfig, suites: Sequence[str]) -> list[Path]:
    """Evaluate the named suites one after the other.

    Raises:
        ConfigError: a suite has no tasks, or no answers are asked for.
        VerifierError: too many verdicts were lost.
    """
    section = config.eval
    if not section.greedy and section.draws == 0:
        raise ConfigError("eval.greedy = false and eval.draws = 0: there is nothing to evaluate")
    if section.draws and config.rollout.temperature == 0:
        raise ConfigError("eval.draws needs rollout.temperature > 0; set eval.draws=0 for greedy answers only")
    import_verifiers(config.verifier)
    loaded = {suite: load_suite(config, suite) for suite in suites}
    began = time.perf_counter()
    model = open_model(config.run, config.model, config.parallel, served=config.rollout.engine == "vllm")
    with ExitStack() as stack:
        folder, longest = Path(config.eval.output) / "rollout", model.architecture.max_position_embeddings
        engine = open_model_engine(config.rollout, model, config.model, folder, longest, stack)
        opened = time.perf_counter() - began
        pool = open_verifiers(config.verifier, model.groups, stack)
        return [evaluate_suite(config, model, engine, suite, loaded[suite], pool, opened) for suite in suites]


def load_suite(config: EvalConfig, suite: str) -> list[LoadedTask]:
    """The tasks of a suite with their data.

    Raises:
        ConfigError: the configuration names none, or two have the same name.
        EvalError: an unknown task, or a file and line that cannot be used.
    """
    sections: list[EvalTaskSection] = config.eval.dev if suite == "dev" else config.eval.unseen
    find: Callable[[str], EvalTask] = dev_task if suite == "dev" else unseen_task
    if not sections:
        raise ConfigError(f"eval.{suite} names no task")
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise ConfigError(f"eval.{suite}: the names {sorted(names)} are not all different")
    return [
        load_task(
            section.name,
            find(section.task),
            section.path,
            limit=section.limit,
            few_shot=section.few_shot,
            few_shot_path=section.few_shot_path,
            prompting=section.prompting,
        )
        for section in sections
    ]


def evaluate_suite(
    config: EvalConfig,
    model: OpenModel,
    engine: EmbeddedEngine | ServedModel,
    suite: str,
    tasks: list[LoadedTask],
    pool: VerifierPool | None,
    load_seconds: float,
) -> Path:
    """Answer, score and write one suite; collective. Data-parallel replicas share the prompts of each task."""
    began = time.perf_counter()
    groups = model.groups
    options = RunOptions(
        greedy=config.eval.greedy,
        draws=config.eval.draws,
        sampling=sampling_of(config.rollout, model.tokenizer, model.source.base),
        bootstrap_samples=config.eval.bootstrap_samples,
        confidence=config.eval.confidence,
        keep_completions=config.eval.keep_completions,
        seed=config.run.seed,
    )
    answers, seconds = answer_tasks(
        tasks,
        [range(groups.dp_rank, len(task.instances), groups.dp_size) for task in tasks],
        options,
        tokenizer=model.tokenizer,
        template=ChatTemplate.load(config.eval.chat_template, model.tokenizer),
        generate=engine.generate_batch,
        verify=lambda pairs: verify_in_replica(groups, pool, pairs),
    )
    shares = groups.all_gather_object((answers, pool.take_stats().as_dict()) if pool else None)
    leaders = [share for share in shares if share is not None]
    verdicts = lost_verdicts([counts for _, counts in leaders], config.verifier.max_lost_share, f"eval {suite}")
    path = Path(config.eval.output) / f"{suite}.json"
    if groups.is_main:
        merged = [
            sorted((answer for share, _ in leaders for answer in share[number]), key=lambda answer: answer.instance)
            for number in range(len(tasks))
        ]
        results = {
            "suite": suite,
            "model": {"path": config.model.path, "kind": model.source.kind, "fingerprint": model.fingerprint},
            "settings": _settings(config),
            "config": config.model_dump(mode="json"),
            "tasks": {task.name: summarise(task, chosen, options) for task, chosen in zip(tasks, merged, strict=True)},
            "verifier": verdicts,
            "timing": _timing(merged, seconds, load_seconds, time.perf_counter() - began),
            "versions": {
                "tulu_hpc": tulu_hpc.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
    with shared_writing(groups, str(path)):
        if groups.is_main:
            _write(path, results)
            if suite == "unseen":
                _log_unseen(config, model, path)
            _show(model, results)
    return path


def _settings(config: EvalConfig) -> dict[str, Any]:
    rollout, section = config.rollout, config.eval
    return {
        "seed": config.run.seed,
        "engine": rollout.engine,
        "draws": section.draws,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "max_new_tokens": rollout.max_new_tokens,
        "bootstrap_samples": section.bootstrap_samples,
        "confidence": section.confidence,
        "chat_template": section.chat_template,
        "verifier_rules": config.verifier.rules,
    }


def _timing(
    merged: Sequence[Sequence[Answer]], seconds: dict[str, float], load_seconds: float, total: float
) -> dict[str, float]:
    tokens = sum(answer.tokens for answers in merged for answer in answers)
    return {
        "load_seconds": load_seconds,
        "generate_seconds": seconds["generate"],
        "verify_seconds": seconds["verify"],
        "total_seconds": total,
        "new_tokens": float(tokens),
        "tokens_per_second": tokens / max(seconds["generate"], 1e-9),
    }


def _write(path: Path, results: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def _log_unseen(config: EvalConfig, model: OpenModel, path: Path) -> None:
    log = Path(config.run.root) / UNSEEN_LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": config.model.path,
        "fingerprint": model.fingerprint,
        "tasks": [section.name for section in config.eval.unseen],
        "results": str(path),
    }
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _show(model: OpenModel, results: dict[str, Any]) -> None:
    for name, task in results["tasks"].items():
        shown = "  ".join(
            f"{mode} {100 * score['score']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
            for mode, score in task["scores"].items()
        )
        model.say(f"eval {results['suite']}: {name} ({task['prompts']} prompts)  {shown}")
    if lost := describe_lost(results["verifier"]):
        model.say(f"eval {results['suite']}: {lost}, each scored 0")
