"""Rewards and advantages of sampled answers, relative to the other answers to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

_EPSILON = 1e-8


def group_advantages(
    rewards_G: Sequence[float], kind: Literal["standard", "centered", "leave_one_out"] = "standard"
) -> list[float] | None:
    """Advantage of each answer of a group of G; None when all rewards are equal: nothing says which answer is better.

    Kinds:
        standard: (reward - mean) / (std + 1e-8) (GRPO, arXiv 2402.03300). The standard deviation is the sample's (G - 1
            in the denominator), as in the code that trained Tulu 3.1.
        centered: reward - mean (Dr. GRPO, arXiv 2503.20783).
        leave_one_out: reward - mean of the other answers (RLOO, arXiv 2402.14740), G / (G - 1) times centered.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite.
    """
    count = len(rewards_G)
    if count < 2 or not all(math.isfinite(reward) for reward in rewards_G):
        raise ValueError(f"a group needs at least two finite rewards, got {list(rewards_G)}")
    if max(rewards_G) == min(rewards_G):
        return None
    mean = math.fsum(rewards_G) / count
    centered = [reward - mean for reward in rewards_G]
    if kind == "centered":
        return centered
    if kind == "leave_one_out":
        return [value * count / (count - 1) for value in centered]
    deviation = math.sqrt(math.fsum(value * value for value in centered) / (count - 1))
    return [value / (deviation + _EPSILON) for value in centered]


def overlong_share(length: int, longest: int, buffer: int) -> float:
    """Share of the penalty for length that an answer gets: 0 up to `longest - buffer` tokens, from there rising in a
    line to 1 at `longest` (DAPO's soft overlong punishment, arXiv 2503.14476 eq. 13, with its sign turned).

    Raises:
        ValueError: `buffer` is not between 0 and `longest`.
    """
    if not 0 <= buffer <= longest:
        raise ValueError(f"an overlong buffer of {buffer} tokens does not fit into answers of {longest}")
    if buffer == 0:
        return 0.0
    return min(max(length - (longest - buffer), 0) / buffer, 1.0)
