"""How fast a run trains: tokens and FLOPs per second, where the time goes, memory, and who holds the others up."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import TelemetrySection
from tulu_hpc.data.flops import Recompute, Work, hardware_flops, model_flops
from tulu_hpc.parallel.failures import shared_writing
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.planner.peak import peak_of_device
from tulu_hpc.telemetry import memory
from tulu_hpc.telemetry.metrics import TelemetryError, truncate_after
from tulu_hpc.telemetry.step_clock import PHASES, Marks, Phase, StepClock
from tulu_hpc.telemetry.stragglers import RankTimes, compare
from tulu_hpc.training.step import StepResult

STRAGGLERS = "stragglers.jsonl"


@dataclass
class Throughput:
    """Adds up steps and tells their averages; one per process, `add` and `metrics` are collective.

    Attributes:
        directory: of the run.
        clock: of the trainer.
        peak_flops: of all processes together (`total_peak`).
    """

    groups: Groups
    architecture: Architecture
    recompute: Recompute
    telemetry: TelemetrySection
    directory: Path
    clock: StepClock
    peak_flops: float
    _steps: int = 0
    _work: Work = field(default_factory=Work)
    _targets: int = 0
    _seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _pending: Marks | None = None
    _own: list[float] = field(default_factory=list)
    _straggler: dict[str, float] = field(default_factory=dict)

    def add(self, result: StepResult, marks: Marks) -> None:
        """Count a step; every telemetry.straggler_every steps the ranks compare their times."""
        self._settle()
        self._pending = marks
        self._steps += 1
        self._work += result.work
        self._targets += result.targets
        if result.step % self.telemetry.straggler_every == 0:
            self._settle()
            self._compare(result.step)

    def metrics(self) -> dict[str, float]:
        """Averages over the steps since the last call; times are means over ranks, memory is that of the worst rank."""
        self._settle()
        groups, architecture = self.groups, self.architecture
        peaks = memory.peaks(reset=True)
        times = torch.tensor([*self._seconds.values()], dtype=torch.float64, device=_device())
        worst = torch.tensor([*peaks.values()], dtype=torch.float64, device=_device())
        if groups.world_size > 1:
            dist.all_reduce(times)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        per_step = (times / groups.world_size / self._steps).tolist()
        step = sum(per_step)
        whole = step * self._steps
        useful = model_flops(architecture, self._work)
        done = hardware_flops(architecture, self._work, self.recompute)
        found = {
            "perf/tokens_per_second_per_gpu": self._work.rows / whole / groups.world_size,
            "perf/targets_per_second_per_gpu": self._targets / whole / groups.world_size,
            "perf/tflops_per_gpu": useful / whole / groups.world_size / 1e12,
            "perf/mfu": useful / whole / self.peak_flops,
            "perf/hfu": done / whole / self.peak_flops,
            "timing/step": step,
            **{f"timing/{phase}": seconds for phase, seconds in zip(PHASES, per_step, strict=True)},
            **dict(zip(peaks, worst.tolist(), strict=True)),
            **self._straggler,
        }
        self._steps, self._targets, self._work, self._straggler = 0, 0, Work(), {}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return found

    def _settle(self) -> None:
        """Read the clock of the last step; on a GPU it has been left alone until now, so as not to wait for it."""
        if self._pending is None:
            return
        seconds = self.clock.seconds(self._pending)
        self._pending = None
        for phase, value in seconds.items():
            self._seconds[phase] += value
        self._own.append(sum(seconds.values()) - seconds["communication"])

    def _compare(self, step: int) -> None:
        ratio = self.telemetry.straggler_ratio
        self._straggler = report_stragglers(self.groups, self._own, step, self.directory, ratio)
        self._own = []


def of_value_model(architecture: Architecture) -> Architecture:
    """The shape with the head that a value model computes: one number per row."""
    return architecture.model_copy(update={"vocab_size": 1})


def open_stragglers(groups: Groups, directory: Path, step: int) -> None:
    """Keep the lines of a run's stragglers.jsonl up to `step`, where it goes on. Collective.

    Raises:
        WriteError, TelemetryError: on every rank.
    """
    path = directory / STRAGGLERS
    with shared_writing(groups, str(path), also=(TelemetryError,)):
        if groups.is_main:
            truncate_after(path, step)


def report_stragglers(
    groups: Groups, own: Sequence[float], step: int, directory: Path, ratio: float
) -> dict[str, float]:
    """Compare the ranks' own times of the last steps: a line in stragglers.jsonl, a warning, metrics. Collective.

    Args:
        own: seconds of each step on this rank, waiting for others left out.
        ratio: of the slowest to the median from which on there is a warning.

    Raises:
        WriteError: on every rank.
    """
    report = compare(groups.all_gather_object(RankTimes(groups.rank, socket.gethostname(), tuple(own))))
    path = directory / STRAGGLERS
    with shared_writing(groups, str(path)):
        if groups.is_main:
            with path.open("a") as file:
                file.write(json.dumps(report.record(step)) + "\n")
    warning = report.warning(ratio)
    if warning is not None and groups.is_main:
        print(f"step {step}: {warning}", file=sys.stderr, flush=True)
    return report.metrics()


def total_peak(groups: Groups, dtype: torch.dtype, tflops: float | None) -> tuple[float, str]:
    """FLOP/s of all processes together, and a sentence on where the figure comes from. Collective."""
    groups.barrier()  # where it is measured, all measure at once: they also train at once
    peak = peak_of_device(dtype, tflops)
    sentence = f"MFU is relative to {peak.flops / 1e12:.4g} TFLOP/s per process: {peak.source}"
    return sum(groups.all_gather_object(peak.flops)), sentence


def _device() -> torch.device:
    return torch.device("cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu")
