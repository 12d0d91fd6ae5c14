"""Reads the result files of an evaluation into what the report needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tulu_hpc.telemetry.metrics import TelemetryError


@dataclass(frozen=True)
class Interval:
    """A share in [0, 1] with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answer:
    """One answer that was kept. `sampled` is False for greedy decoding."""

    prompt: str
    completion: str
    correct: bool
    sampled: bool


@dataclass(frozen=True)
class Working:
    """Shares of all sampled answers to a task at one stage, each in [0, 1].

    share: answers that show working. share_correct: answers that show working and are correct. accuracy: correct ones.
    """

    share: float
    share_correct: float
    accuracy: float

    @property
    def accuracy_shown(self) -> float | None:
        return self.share_correct / self.share if self.share > 0 else None

    @property
    def accuracy_direct(self) -> float | None:
        return (self.accuracy - self.share_correct) / (1 - self.share) if self.share < 1 else None


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task.

    suite: "dev" or "unseen". task: its schema (gsm8k, ifeval, ...). items: prompts. draws: sampled answers per prompt.
    working: of the sampled answers, None where the task does not count it. kinds: class of prompt -> sampled (else
    greedy) score and number of prompts. answers: those that were kept. lost_verdicts: of the whole suite.
    """

    name: str
    task: str
    suite: str
    items: int
    draws: int
    temperature: float
    confidence: float
    sampled: Interval | None
    greedy: Interval | None
    working: Working | None
    kinds: Mapping[str, tuple[float, int]]
    answers: Sequence[Answer]
    lost_verdicts: int

    @property
    def headline(self) -> Interval:
        """Sampled accuracy where there is one, else greedy."""
        found = self.sampled or self.greedy
        assert found is not None  # checked when read
        return found

    def first_answers(self) -> dict[str, Answer]:
        """One kept answer by prompt: greedy where there is one, else the first draw."""
        found: dict[str, Answer] = {}
        for answer in sorted(self.answers, key=lambda each: each.sampled):
            found.setdefault(answer.prompt, answer)
        return found


def read_json(path: Path, written_by: str) -> Any:
    """Raises: TelemetryError: no such file (the message says which verb writes it), or not JSON."""
    if not path.is_file():
        raise TelemetryError(f"{path}: not found (it is written by `{written_by}`)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TelemetryError(f"{path}: not JSON ({error})") from error


def load_evaluation(directory: Path) -> list[TaskScores]:
    """Scores of both suites from `dev.json` and `unseen.json` of an evaluation's output directory.

    Raises:
        TelemetryError: neither file is there, one is not in the form that `eval` writes, or they are of two models.
    """
    files = [directory / f"{suite}.json" for suite in ("dev", "unseen") if (directory / f"{suite}.json").is_file()]
    if not files:
        raise TelemetryError(f"{directory}: neither dev.json nor unseen.json is there (they are written by `eval`)")
    found: list[TaskScores] = []
    models: dict[str, Path] = {}
    for file in files:
        results = read_json(file, "eval")
        try:
            models.setdefault(results["model"]["fingerprint"], file)
            found += [_task(name, task, results) for name, task in results["tasks"].items()]
        except (KeyError, TypeError, AttributeError) as error:
            raise TelemetryError(f"{file}: not in the expected form ({type(error).__name__}: {error})") from error
    if len(models) > 1:
        raise TelemetryError(f"{directory}: {' and '.join(file.name for file in files)} are of different models")
    return found


def _task(name: str, task: Mapping[str, Any], results: Mapping[str, Any]) -> TaskScores:
    scores, settings = task["scores"], results["settings"]
    if not scores:
        raise KeyError(f"{name}: scores")
    mode = "sampled" if "sampled" in scores else "greedy"
    metrics = task["metrics"].get("sampled", {})
    working = None
    if "shows_working" in metrics:
        share, correct = metrics["shows_working"], metrics["shows_working_and_correct"]
        working = Working(share, correct, scores["sampled"]["score"])
    return TaskScores(
        name=name,
        task=task["task"],
        suite=results["suite"],
        items=task["prompts"],
        draws=scores["sampled"]["draws"] if "sampled" in scores else 0,
        temperature=settings["temperature"],
        confidence=settings["confidence"],
        sampled=_interval(scores.get("sampled")),
        greedy=_interval(scores.get("greedy")),
        working=working,
        kinds={kind: (row[mode], row["prompts"]) for kind, row in task["by_kind"].items()},
        answers=[
            Answer(kept["prompt"], kept["completion"], kept["score"] >= 1, kept["mode"] == "sampled")
            for kept in task["completions"]
        ],
        lost_verdicts=sum(results["verifier"].get(name, 0) for name in ("timeouts", "crashes", "garbage", "errors")),
    )


def _interval(score: Mapping[str, float] | None) -> Interval | None:
    return None if score is None else Interval(score["score"], score["low"], score["high"])
