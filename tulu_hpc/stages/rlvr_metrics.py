"""Figures of a rollout step, added up over processes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tulu_hpc.rollout.engine import Completion


class MismatchError(RuntimeError):
    """Rollout engine and trainer give different log-probs for the same tokens and weights."""


@dataclass
class Mismatch:
    """Difference of log-probs between engine and trainer: |d| = |trainer - engine| per token."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0
    multiplied: float = 0.0  # sum of exp(|d|)
    divergence: float = 0.0  # sum of exp(d) - 1 - d with d = trainer - engine

    def add(self, trainer_K: Tensor, engine_K: Tensor) -> None:
        """Count the tokens of one pack (or of this rank's part of it)."""
        if trainer_K.numel() == 0:
            return
        signed = trainer_K.double() - engine_K.double()
        difference = signed.abs()
        self.count += difference.numel()
        divergence = (signed.expm1() - signed).sum()
        values = torch.stack((difference.sum(), difference.max(), difference.exp().sum(), divergence)).tolist()
        self.total += values[0]
        # max() would drop a NaN, which is the worst mismatch of all.
        self.largest = math.nan if math.isnan(values[1]) else max(self.largest, values[1])
        self.multiplied += values[2]
        self.divergence += values[3]


def breach(parts: Sequence[Mismatch], most: float | None, most_mult_prob: float) -> str | None:
    """What the differences exceed, or None. A NaN exceeds everything."""
    tokens = sum(part.count for part in parts)
    if tokens == 0:
        return None
    largest = max(math.inf if math.isnan(part.largest) else part.largest for part in parts)
    mult_prob = sum(part.multiplied for part in parts) / tokens
    if most is not None and largest > most:
        return f"by up to {largest:.3g} (limit {most:g}) over {tokens} tokens"
    if not mult_prob <= most_mult_prob:
        return f"by so much that exp(|difference|) is {mult_prob:.4g} on average (limit {most_mult_prob:g})"
    return None


def mismatch_metrics(parts: Sequence[Mismatch]) -> dict[str, float]:
    """Of |d|: mean, largest, and mean of exp(|d|) (1 for perfect agreement); `mismatch_kl` is the k3 estimate of
    KL(engine || trainer) (http://joschu.net/blog/kl-approx.html)."""
    count = sum(part.count for part in parts)
    if count == 0:
        return {}
    return {
        "rollout/logprob_error_mean": sum(part.total for part in parts) / count,
        "rollout/logprob_error_max": max(part.largest for part in parts),
        "rollout/token_mult_prob_error": sum(part.multiplied for part in parts) / count,
        "rollout/mismatch_kl": sum(part.divergence for part in parts) / count,
    }


@dataclass
class RolloutStats:
    """Counts of the answers of one replica in one step."""

    groups: int = 0
    live_groups: int = 0  # with two different rewards
    sequences: int = 0
    tokens: int = 0
    finished: int = 0
    reward: float = 0.0
    by_dataset: dict[str, list[float]] = field(default_factory=dict)  # [sum of accuracy, answers]

    def add(self, dataset: str, reward: float, accuracy: float, completion: Completion, finished: bool) -> None:
        """Count one answer; `accuracy` is its share of the full verification reward."""
        self.sequences += 1
        self.tokens += len(completion.token_ids)
        self.finished += finished
        self.reward += reward
        entry = self.by_dataset.setdefault(dataset, [0.0, 0.0])
        entry[0] += max(accuracy, 0.0)
        entry[1] += 1


def rollout_metrics(parts: Sequence[RolloutStats]) -> dict[str, float]:
    """Means over all answers of the step; `rollout/live_groups` is the share of groups that carry a gradient."""
    sequences = sum(part.sequences for part in parts)
    totals: dict[str, list[float]] = {}
    for part in parts:
        for name, (accuracy, count) in part.by_dataset.items():
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + accuracy, entry[1] + count
    return {
        "rollout/reward": sum(part.reward for part in parts) / sequences,
        "rollout/accuracy": sum(accuracy for accuracy, _ in totals.values()) / sequences,
        **{f"rollout/accuracy/{name}": totals[name][0] / totals[name][1] for name in sorted(totals)},
        "rollout/length": sum(part.tokens for part in parts) / sequences,
        "rollout/eos_rate": sum(part.finished for part in parts) / sequences,
        "rollout/live_groups": sum(part.live_groups for part in parts) / sum(part.groups for part in parts),
        "rollout/new_tokens": float(sum(part.tokens for part in parts)),
    }


class Clock:
    """Seconds of the parts of a step on this process."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def metrics(self) -> dict[str, float]:
        return {f"timing/{name}": seconds for name, seconds in self._laps.items()} | {
            "timing/step": time.perf_counter() - self._begin
        }
