"""torch's profiler and CUDA's memory history on chosen steps, one file per step and rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from tulu_hpc.telemetry.metrics import TelemetryError

DIRECTORY = "profile"
_MOST_ALLOCATIONS = 1_000_000


class StepProfiler:
    """Traces chosen steps of this process.

        profile/step_N_rank_R.json             Chrome trace: chrome://tracing, ui.perfetto.dev
        profile/memory_step_N_rank_R.pickle    allocations of the step: pytorch.org/memory_viz

    Args:
        directory: of the run.
        profile_steps, memory_snapshot_steps: counted from 1.
        writing: wraps the writing of the file that it is given the name of; may keep an OSError for later, so that one
            rank does not stop alone.

    Raises:
        TelemetryError: memory snapshots were asked for without a GPU, whose allocator is what records them.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        *,
        profile_steps: Collection[int] = (),
        memory_snapshot_steps: Collection[int] = (),
        writing: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext(),
    ) -> None:
        import torch

        if memory_snapshot_steps and not torch.cuda.is_available():
            raise TelemetryError(
                "telemetry.memory_snapshot_steps: torch records allocations on CUDA only and there is no GPU here; "
                "telemetry.profile_steps works everywhere"
            )
        self._directory, self._rank = directory / DIRECTORY, rank
        self._writing = writing
        self._profile, self._memory = frozenset(profile_steps), frozenset(memory_snapshot_steps)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number` inside."""
        with ExitStack() as stack:
            if number in self._memory:
                stack.enter_context(self._memory_history(number))
            if number in self._profile:
                stack.enter_context(self._trace(number))
            yield

    @contextmanager
    def _trace(self, number: int) -> Iterator[None]:
        from torch.profiler import profile, supported_activities

        with profile(activities=list(supported_activities())) as profiler:
            yield
        path = self._directory / f"step_{number}_rank_{self._rank}.json"
        with self._writing(str(path)):
            self._directory.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            profiler.export_chrome_trace(str(path))
            _require_whole(path)

    @contextmanager
    def _memory_history(self, number: int) -> Iterator[None]:
        from torch.cuda import memory

        memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        try:
            yield
            path = self._directory / f"memory_step_{number}_rank_{self._rank}.pickle"
            with self._writing(str(path)):
                self._directory.mkdir(parents=True, exist_ok=True)
                memory._dump_snapshot(str(path))
        finally:
            memory._record_memory_history(enabled=None)


def _require_whole(path: Path) -> None:
    """torch says on the error stream that it cannot write a trace, and goes on.

    Raises:
        OSError: there is no file, or its end is missing.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"{path} was not written to its end (disk full?)")
