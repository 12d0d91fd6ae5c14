"""Where the time of a step goes: every moment belongs to exactly one phase, so the phases sum to the step.

On a CPU moments are read from the host's clock. On a GPU they are CUDA events in the stream that computes, so that a
phase is what the device spent in it, not how long the host took to queue it; nothing waits for the device before
`seconds` is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

Phase = Literal["data", "forward", "backward", "communication", "optimizer", "other"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "communication", "optimizer", "other")
Marks = list[tuple[Any, Phase]]  # the phase that begins at each stamp


class StepClock:
    """Sums up the time of nested phases; an inner phase interrupts the outer one.

    Args:
        stamp: reads the clock; the default is the host's.
        difference: seconds between two stamps, called only in `seconds` (where it may wait for the device).
    """

    def __init__(
        self, stamp: Callable[[], Any] = time.perf_counter, difference: Callable[[Any, Any], float] | None = None
    ) -> None:
        self._stamp = stamp
        self._difference = difference or (lambda begin, end: float(end - begin))
        self._marks: Marks | None = None
        self._stack: list[Phase] = []

    @property
    def running(self) -> bool:
        return self._marks is not None

    def start(self) -> None:
        """Begin a step, in phase `other`; what an aborted one has left is forgotten."""
        self._stack = ["other"]
        self._marks = [(self._stamp(), "other")]

    def enter(self, phase: Phase) -> None:
        """Begin a phase; without effect while no step runs."""
        if self._marks is not None:
            self._stack.append(phase)
            self._marks.append((self._stamp(), phase))

    def leave(self) -> None:
        """End the innermost phase and go on with the one around it."""
        if self._marks is not None and len(self._stack) > 1:
            self._stack.pop()
            self._marks.append((self._stamp(), self._stack[-1]))

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def stop(self) -> Marks:
        """End the step; `seconds` reads it.

        Raises:
            RuntimeError: no step runs.
        """
        if self._marks is None:
            raise RuntimeError("StepClock.stop without start")
        marks, self._marks = [*self._marks, (self._stamp(), "other")], None
        return marks

    def seconds(self, marks: Marks) -> dict[Phase, float]:
        """Seconds of every phase of a step that has been stopped; waits for the device where it has not come so far."""
        seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        for (begin, phase), (end, _) in pairwise(marks):
            seconds[phase] += self._difference(begin, end)
        return seconds


def device_clock() -> StepClock:
    """A clock of the GPU's main stream where there is a GPU, else of the host."""
    import torch

    if not torch.cuda.is_available():
        return StepClock()

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def difference(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return StepClock(stamp, difference)
