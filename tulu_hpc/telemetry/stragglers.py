"""Which rank holds the others up.

Ranks of a synchronous step all take the same time; what tells them apart is how much of it each spends working rather
than waiting in collectives. That is what is compared here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class RankTimes:
    """Seconds of own work (the step without communication) of one rank in the last steps."""

    rank: int
    host: str
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class StragglerReport:
    """Ranks in order, each with (min, median, max) seconds of own work per step; `ratio` is slowest to median."""

    times: tuple[RankTimes, ...]
    slowest: RankTimes
    ratio: float

    def metrics(self) -> dict[str, float]:
        medians = [median(each.seconds) for each in self.times]
        return {
            "straggler/own_min": min(medians),
            "straggler/own_median": median(medians),
            "straggler/own_max": max(medians),
            "straggler/rank": float(self.slowest.rank),
            "straggler/ratio": self.ratio,
        }

    def record(self, step: int) -> dict[str, Any]:
        """One line of `stragglers.jsonl`."""
        ranks = [
            {
                "rank": each.rank,
                "host": each.host,
                "min": min(each.seconds),
                "median": median(each.seconds),
                "max": max(each.seconds),
            }
            for each in self.times
        ]
        slowest = {"rank": self.slowest.rank, "host": self.slowest.host}
        return {"step": step, "ratio": self.ratio, "slowest": slowest, "ranks": ranks}

    def warning(self, allowed: float) -> str | None:
        """A sentence when the slowest rank takes more than `allowed` times the median of all."""
        if self.ratio <= allowed:
            return None
        mine = median(self.slowest.seconds)
        return (
            f"rank {self.slowest.rank} on {self.slowest.host} works {mine:.4g} s per step, {self.ratio:.2f} times the "
            f"median of all ranks (the median of its last {len(self.slowest.seconds)} steps)"
        )


def compare(times: Sequence[RankTimes]) -> StragglerReport:
    """The report on all ranks; each must have at least one step."""
    slowest = max(times, key=lambda each: (median(each.seconds), -each.rank))
    middle = median(median(each.seconds) for each in times)
    return StragglerReport(tuple(times), slowest, median(slowest.seconds) / middle if middle > 0 else 1.0)
