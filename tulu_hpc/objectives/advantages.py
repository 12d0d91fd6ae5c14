"""Advantages of sampled answers, relative to the other answers to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

_EPSILON = 1e-8


def group_advantages(
    rewards_G: Sequence[float], kind: Literal["standard", "centered"] = "standard"
) -> list[float] | None:
    """Advantage of each answer of a group: reward minus the group's mean, `standard`: over (std + 1e-8) (GRPO).

    The standard deviation is the sample's (G - 1 in the denominator), as in the code that trained Tulu 3.1. None when
    all rewards are equal: such a group says nothing about which answer is better.

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
    deviation = math.sqrt(math.fsum(value * value for value in centered) / (count - 1))
    return [value / (deviation + _EPSILON) for value in centered]
