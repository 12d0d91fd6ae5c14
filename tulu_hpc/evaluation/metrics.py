"""Means with bootstrap confidence intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

_CHUNK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its interval, all in [0, 1]; `draws` is answers per prompt."""

    score: float
    low: float
    high: float
    prompts: int
    draws: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def estimate(values: Sequence[Sequence[float]], *, samples: int, confidence: float, seed: int) -> Estimate:
    """Mean of the prompts' means, with the percentile bootstrap interval over prompts (Efron 1979).

    Prompts are drawn with replacement and their answers kept together: answers to one prompt are not independent.

    Args:
        values: per prompt the scores of its answers, equally many for each.
        samples: bootstrap samples.
        confidence: probability mass of the interval, e.g. 0.95.

    Raises:
        ValueError: no prompts, no answers, or unequal numbers of answers.
    """
    if not values or not values[0] or len({len(answers) for answers in values}) != 1:
        raise ValueError("every prompt needs the same number (at least 1) of scored answers")
    means = np.asarray(values, dtype=np.float64).mean(axis=1)
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows = max(1, _CHUNK // len(means))
    resampled = [
        means[generator.integers(0, len(means), size=(min(rows, samples - start), len(means)))].mean(axis=1)
        for start in range(0, samples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(resampled), [tail, 1 - tail])
    return Estimate(float(means.mean()), float(low), float(high), len(means), len(values[0]))
