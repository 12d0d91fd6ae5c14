"""A tiny model with prompts and evaluation files, and the stages run on it in forked processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.parallel.forked import run_forked
from tests.training import tiny_run
from tulu_hpc.config.schema import EvalConfig, PreferConfig, RlvrConfig
from tulu_hpc.rollout import embedded

LOWERCASE = {"func_name": "validate_lowercase"}


def write_inputs(folder: Path) -> Path:
    """`folder/{model,prompts.jsonl,math.jsonl,if.jsonl}`; returns the folder."""
    tiny_run.write_inputs(folder)
    words = tiny_run.WORDS
    with (folder / "prompts.jsonl").open("w") as file:
        for index in range(12):
            content = f"{words[index]} {words[index + 3]}"
            row = {"messages": [{"role": "user", "content": content}], "ground_truth": LOWERCASE, "dataset": "ifeval"}
            file.write(json.dumps(row) + "\n")
    with (folder / "math.jsonl").open("w") as file:
        for index in range(9):
            row = {
                "question": f"add {index} and 2",
                "answer": f"{index}+2=<<{index}+2={index + 2}>>{index + 2}\n#### {index + 2}",
            }
            file.write(json.dumps(row) + "\n")
    with (folder / "if.jsonl").open("w") as file:
        for index in range(7):
            row = {
                "key": index,
                "prompt": f"say {words[index]}",
                "instruction_id_list": ["change_case:english_lowercase"],
                "kwargs": [None],
            }
            file.write(json.dumps(row) + "\n")
    return folder


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return values


def rlvr_config(inputs: Path, run: Path, *, value: dict[str, Any] | None = None, **changes: Any) -> RlvrConfig:
    """A short run; `changes` are dotted keys with `__` for the dot, `value` is that section."""
    values: dict[str, Any] = {
        "run": {"dir": str(run), "root": str(run.parent), "seed": 3, "threads": 1},
        "model": {"path": str(inputs / "model")},
        "data": {"path": str(inputs / "prompts.jsonl"), "max_length": 32},
        "optimizer": {"lr": 0.01, "schedule": "constant"},
        "train": {"steps": 4, "pack_rows": 128, "save_every": 2, "export_hf": False},
        "rlvr": {"prompts_per_step": 6, "samples_per_prompt": 4},
        "rollout": {"max_new_tokens": 8, "max_sequences": 16, "temperature": 0.9},
        "telemetry": {"tensorboard": False, "peak_tflops": 1},
    }
    return RlvrConfig.model_validate(_merge(values, changes) | ({} if value is None else {"value": value}))


def prefer_config(inputs: Path, output: Path, **changes: Any) -> PreferConfig:
    values: dict[str, Any] = {
        "run": {"root": str(output.parent), "seed": 3, "threads": 1},
        "model": {"path": str(inputs / "model")},
        "data": {"path": str(inputs / "prompts.jsonl"), "max_length": 32},
        "prefer": {"samples_per_prompt": 6, "output": str(output)},
        "rollout": {"max_new_tokens": 8},
    }
    return PreferConfig.model_validate(_merge(values, changes))


def eval_config(inputs: Path, output: Path, **changes: Any) -> EvalConfig:
    """The unseen suite points to a file that is not there: a development run must not touch it."""
    values: dict[str, Any] = {
        "run": {"root": str(output.parent), "seed": 3, "threads": 1},
        "model": {"path": str(inputs / "model")},
        "eval": {
            "dev": [
                {"name": "math", "task": "gsm8k", "path": str(inputs / "math.jsonl")},
                {"name": "instructions", "task": "ifeval", "path": str(inputs / "if.jsonl")},
            ],
            "unseen": [{"name": "hidden", "task": "gsm8k", "path": str(inputs / "unseen.jsonl")}],
            "bootstrap_samples": 200,
            "keep_completions": 3,
            "output": str(output),
        },
        "rollout": {"max_new_tokens": 8},
    }
    return EvalConfig.model_validate(_merge(values, changes))


def in_processes(stage: Any, config: Any, world: int = 1, **options: Any) -> Any:
    """Run a stage on `world` forked ranks (one, too: it sets the determinism of its whole process)."""
    return run_forked(world, lambda: stage(config, **options))[0]


class Stopped(RuntimeError):
    """The death of a stage in `run_and_die`."""


def run_and_die(stage: Callable[[Any], Any], config: Any, after: int) -> None:
    """Run a stage until its engine is asked for the samples of batch `after` + 1, then die without a trace."""
    generate, calls = embedded.EmbeddedEngine.generate_batch, 0

    def counted(self: Any, requests: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stopped
        return generate(self, requests)

    embedded.EmbeddedEngine.generate_batch = counted  # type: ignore[method-assign]  # of this forked process only
    stage(config)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_metrics(run: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    rows = metrics(run)
    machine = ("timing/", "perf/", "memory/", "straggler/")
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith(machine)} for row in rows]
