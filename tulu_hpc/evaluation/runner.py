"""Runs tasks with any engine and verifier: prompts in, scores with intervals out.

`generate` and `verify` are functions, so that the same runner serves the embedded engine and a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tulu_hpc.data.chat_template import ChatTemplate, encode_prompt, encode_texts
from tulu_hpc.evaluation.metrics import estimate
from tulu_hpc.evaluation.tasks import EvalError, EvalTask, Instance, Prompt, Prompting, build_prompt, read_instances
from tulu_hpc.rollout.engine import Completion, Request, Sampling
from tulu_hpc.rollout.sampling import derive_seed
from tulu_hpc.rollout.texts import completion_text, ended_itself
from tulu_hpc.verifiers import Verdict
from tulu_hpc.verifiers.gsm8k import shows_working

MODES = ("greedy", "sampled")


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data: `name` is the key of its scores."""

    name: str
    task: EvalTask
    path: str
    instances: list[Instance]
    examples: list[Instance]
    prompting: Prompting


@dataclass(frozen=True)
class RunOptions:
    """How answers are drawn and scores are estimated; see the configuration's `eval` section."""

    greedy: bool
    draws: int
    sampling: Sampling  # of the sampled answers
    bootstrap_samples: int
    confidence: float
    keep_completions: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """One answer to one instance; plain values, so that it can be sent between processes."""

    instance: int
    mode: str
    text: str
    score: float
    reason: str
    metrics: dict[str, float]
    tokens: int


def load_task(
    name: str,
    task: EvalTask,
    path: str,
    *,
    limit: int | None = None,
    few_shot: int = 0,
    few_shot_path: str | None = None,
    prompting: Prompting = "chat",
) -> LoadedTask:
    """Read a task's files.

    Raises:
        EvalError: naming the file and line, or what is missing for few-shot prompting.
    """
    instances = read_instances(task, path, limit=limit)
    examples: list[Instance] = []
    if few_shot:
        if few_shot_path is None:
            raise EvalError(f"eval task {name!r}: few_shot = {few_shot} needs few_shot_path")
        examples = read_instances(task, few_shot_path, limit=few_shot)
        if len(examples) < few_shot:
            raise EvalError(f"{few_shot_path}: {len(examples)} rows, but few_shot = {few_shot}")
    shared = {example.id for example in examples} & {instance.id for instance in instances}
    if shared:
        raise EvalError(f"eval task {name!r}: the example {min(shared)} is also evaluated")
    return LoadedTask(name, task, path, instances, examples, prompting)


def make_requests(
    loaded: LoadedTask, indices: Sequence[int], options: RunOptions, tokenizer: Any, template: ChatTemplate
) -> list[tuple[int, str, Request]]:
    """(index of the instance, mode, request) of every answer to the given instances."""
    requests: list[tuple[int, str, Request]] = []
    for index in indices:
        instance = loaded.instances[index]
        token_ids = _encode(build_prompt(loaded.task, instance, loaded.examples, loaded.prompting), tokenizer, template)
        stop = tuple(dict.fromkeys((*options.sampling.stop_strings, *loaded.task.stop)))
        for mode, count in (("greedy", int(options.greedy)), ("sampled", options.draws)):
            sampling = Sampling(
                max_new_tokens=options.sampling.max_new_tokens,
                temperature=0.0 if mode == "greedy" else options.sampling.temperature,
                top_p=1.0 if mode == "greedy" else options.sampling.top_p,
                stop_token_ids=options.sampling.stop_token_ids,
                stop_strings=stop,
            )
            for draw in range(count):
                seed = derive_seed("eval", options.seed, loaded.name, instance.id, draw)
                requests.append((index, mode, Request(token_ids, sampling, seed, instance.id)))
    return requests


def answer_tasks(
    tasks: Sequence[LoadedTask],
    shares: Sequence[Sequence[int]],
    options: RunOptions,
    *,
    tokenizer: Any,
    template: ChatTemplate,
    generate: Callable[[Sequence[Request]], list[Completion]],
    verify: Callable[[Sequence[tuple[Mapping[str, Any], str]]], list[Verdict]],
) -> tuple[list[list[Answer]], dict[str, float]]:
    """Answers of this process's share of the instances of each task, and the seconds spent.

    All tasks go to the engine in one call, so that a small task does not decode in small batches.
    """
    planned = [
        (number, index, mode, request)
        for number, (loaded, share) in enumerate(zip(tasks, shares, strict=True))
        for index, mode, request in make_requests(loaded, share, options, tokenizer, template)
    ]
    started = time.perf_counter()
    completions = generate([request for *_, request in planned])
    generated = time.perf_counter()
    texts = [completion_text(tokenizer, completion) for completion in completions]
    records = [tasks[number].instances[index].record for number, index, *_ in planned]
    verdicts = verify(list(zip(records, texts, strict=True)))
    seconds = {"generate": generated - started, "verify": time.perf_counter() - generated}
    answers: list[list[Answer]] = [[] for _ in tasks]
    for (number, index, mode, _), text, completion, verdict in zip(planned, texts, completions, verdicts, strict=True):
        task = tasks[number].task
        metrics = {"strict": verdict.score, **verdict.metrics, "finished": float(ended_itself(completion))}
        # A verdict that was lost carries no metrics: it scores 0 whatever the task counts.
        score = verdict.score if task.metric == "score" else float(verdict.metrics.get(task.metric, 0.0))
        if task.shows_working:
            shown = float(shows_working(text))
            # Both means together give the accuracy of answers with and without working.
            metrics |= {"shows_working": shown, "shows_working_and_correct": shown * score}
        answers[number].append(Answer(index, mode, text, score, verdict.reason, metrics, len(completion.token_ids)))
    return answers, seconds


def summarise(loaded: LoadedTask, answers: Sequence[Answer], options: RunOptions) -> dict[str, Any]:
    """Scores, metrics, breakdown by kind and kept completions of one task, from the answers of all processes."""
    modes = [mode for mode in MODES if any(answer.mode == mode for answer in answers)]
    scores: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for mode in modes:
        chosen = [answer for answer in answers if answer.mode == mode]
        by_instance: dict[int, list[float]] = {}
        for answer in chosen:
            by_instance.setdefault(answer.instance, []).append(answer.score)
        scores[mode] = estimate(
            [by_instance[index] for index in sorted(by_instance)],
            samples=options.bootstrap_samples,
            confidence=options.confidence,
            seed=derive_seed("bootstrap", options.seed, loaded.name, mode),
        ).as_dict()
        names = sorted({name for answer in chosen for name in answer.metrics})
        metrics[mode] = {name: _mean([answer.metrics.get(name, 0.0) for answer in chosen]) for name in names}
        metrics[mode]["tokens"] = _mean([answer.tokens for answer in chosen])
    return {
        "task": loaded.task.name,
        "metric": loaded.task.metric,
        "path": loaded.path,
        "prompts": len(loaded.instances),
        "few_shot": len(loaded.examples),
        "prompting": loaded.prompting,
        "scores": scores,
        "metrics": metrics,
        "by_kind": _by_kind(loaded, answers, modes),
        "completions": _kept(loaded, answers, options.keep_completions),
    }


def _by_kind(loaded: LoadedTask, answers: Sequence[Answer], modes: Sequence[str]) -> dict[str, dict[str, float]]:
    kinds = sorted({instance.kind for instance in loaded.instances})
    table: dict[str, dict[str, float]] = {}
    for kind in kinds:
        chosen = [answer for answer in answers if loaded.instances[answer.instance].kind == kind]
        table[kind] = {"prompts": sum(instance.kind == kind for instance in loaded.instances)}
        table[kind] |= {mode: _mean([answer.score for answer in chosen if answer.mode == mode]) for mode in modes}
    return table


def _kept(loaded: LoadedTask, answers: Sequence[Answer], count: int) -> list[dict[str, Any]]:
    """The first greedy (else sampled) answers to evenly spaced instances: the same prompts for every model."""
    instances = sorted({i * len(loaded.instances) // max(count, 1) for i in range(count)})[: len(loaded.instances)]
    kept = []
    for index in instances:
        for mode in MODES:
            found = next((a for a in answers if a.instance == index and a.mode == mode), None)
            if found is not None:
                instance = loaded.instances[index]
                kept.append(
                    {
                        "id": instance.id,
                        "kind": instance.kind,
                        "prompt": instance.question,
                        "mode": mode,
                        "completion": found.text,
                        "score": found.score,
                        "reason": found.reason,
                        "finished": bool(found.metrics["finished"]),
                    }
                )
    return kept


def _encode(prompt: Prompt, tokenizer: Any, template: ChatTemplate) -> list[int]:
    if not prompt.messages:
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return [*begin, *encode_texts(tokenizer, [prompt.text])[0]]
    token_ids = encode_prompt(tokenizer, template, prompt.messages)
    return token_ids + encode_texts(tokenizer, [prompt.text])[0] if prompt.text else token_ids


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
