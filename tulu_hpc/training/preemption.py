"""Stopping a run on request: save after the current step, leave a mark, exit with a code of its own.

A batch system asks through SIGUSR1 or SIGTERM (to any of the processes) or, where signals do not reach the workers, by
creating `{run.dir}/stop_requested`. The answer is `{run.dir}/preempted` beside a complete checkpoint, and exit code 85.
The flag of every rank travels with the step's metrics, so all ranks stop after the same step at no extra cost.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_REQUEUE = 85


class Preempted(SystemExit):
    """The run saved its state and stops because it was asked to; the process exits with EXIT_REQUEUE."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_REQUEUE)
        self.step = step


class StopRequest:
    """Collects requests to stop; a context manager that restores the signal handlers it replaced.

    Args:
        stop_file: looked for by the main process only (one `stat` per step).
        preempted_file: written by `acknowledge`.
    """

    def __init__(
        self,
        stop_file: Path,
        preempted_file: Path,
        *,
        is_main: bool,
        signals: Iterable[signal.Signals] = (signal.SIGUSR1, signal.SIGTERM),
    ) -> None:
        self._stop_file, self._preempted_file, self._is_main = stop_file, preempted_file, is_main
        self._signals = tuple(signals)
        self._previous: dict[signal.Signals, Any] = {}
        self._signalled = False

    def __enter__(self) -> Self:
        if self._is_main:
            # Marks of an earlier attempt; the request has been met by starting again.
            self._stop_file.unlink(missing_ok=True)
            self._preempted_file.unlink(missing_ok=True)
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def pending(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._signalled or (self._is_main and self._stop_file.exists())

    def acknowledge(self, step: int) -> None:
        """Say that the state of `step` is saved (main process), then stop.

        Raises:
            Preempted: always.
        """
        if self._is_main:
            self._preempted_file.write_text(f"{step}\n")
            self._stop_file.unlink(missing_ok=True)
        raise Preempted(step)
