"""Figures of a rollout step, added up over processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tulu_hpc.rollout.engine import Completion


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
        """Time since the last lap is `name`'s; what comes in several laps is added up."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        return {f"timing/{name}": seconds for name, seconds in self._laps.items()} | {
            "timing/step": time.perf_counter() - self._begin
        }
