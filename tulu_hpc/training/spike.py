"""What is done when the gradient norm jumps: nothing, leave the step out, or stop.

A norm is a spike when it exceeds `factor` times the median of the last `window` norms that were trained on. The
history is part of the checkpoint, so that a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tulu_hpc.config.sections import SpikeSection


class SpikeError(RuntimeError):
    """The gradient norm jumped and `optimizer.spike.policy` does not let it pass; no parameter was changed."""


@dataclass
class SpikeGuard:
    """Decides about each step's gradient norm (equal on all ranks, so that the decision is too).

    Attributes:
        norms: the last `window` norms that were trained on, oldest first.
        skipped: steps left out since the start of the run.
        in_a_row: those of them since the last step that was trained on.
    """

    section: SpikeSection
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0

    @property
    def active(self) -> bool:
        return self.section.policy != "none"

    @property
    def limit(self) -> float | None:
        """Largest norm that passes; None while there is too little history."""
        if not self.active or len(self.norms) < self.section.min_history:
            return None
        return self.section.factor * median(self.norms)

    def is_spike(self, norm: float) -> bool:
        limit = self.limit
        return limit is not None and norm > limit

    def accept(self, norm: float) -> None:
        """Note a norm that is trained on."""
        if self.active:
            self.norms = [*self.norms, norm][-self.section.window :]
            self.in_a_row = 0

    def refuse(self, step: int, norm: float) -> None:
        """Note a spike.

        Raises:
            SpikeError: the policy is `raise`, or `max_in_a_row` steps have been left out already.
        """
        text = f"step {step}: the gradient norm is {norm:.6g}, above {self.limit:.6g} = optimizer.spike.factor x median"
        if self.section.policy == "raise":
            raise SpikeError(text)
        if self.in_a_row >= self.section.max_in_a_row:
            raise SpikeError(f"{text}, after {self.in_a_row} steps left out in a row: this is no spike any more")
        self.skipped += 1
        self.in_a_row += 1

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = [float(norm) for norm in state["norms"]]
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
