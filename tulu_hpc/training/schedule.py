"""Learning-rate schedules, as functions of the number of optimizer steps done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Warm-up from 0 to `lr`, then linear, cosine or no decay to `final_ratio * lr` at `total_steps`.

    Step s (from 0) uses `lr_at(s)`: the first step of a run with warm-up has learning rate 0, and `final_ratio * lr`
    itself is reached after the last step. With `final_ratio` 0 this is transformers' `get_linear_schedule_with_warmup`
    (Tulu 3's) and `get_cosine_schedule_with_warmup`.
    """

    lr: float
    total_steps: int
    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.0
    final_ratio: float = 0.0

    @property
    def warmup_steps(self) -> int:
        """`int(total_steps * warmup_ratio)`, as open-instruct; robust to 0.29 * 100 = 28.999..."""
        return math.floor(self.total_steps * self.warmup_ratio + 1e-6)

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0).

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.kind == "constant":
            return self.lr
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        remaining = 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.final_ratio + (1.0 - self.final_ratio) * remaining)
