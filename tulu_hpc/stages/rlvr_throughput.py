"""How fast the models of a rollout step are: FLOPs per second, where the time goes, memory, who holds the others up.

A step has phases in which packs go through a model: `reference`, `old_logprobs` and `values` forward only, `train` and
`value_train` forward and backward. Each is timed by the clock of the trainers and counted by the exact FLOPs of its
packs (`data.flops`), as sft and dpo are. Generation and verification are no such phases: `timing/...` alone has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import TelemetrySection
from tulu_hpc.data.flops import Recompute, Work, forward_flops, hardware_flops, model_flops, packs_work
from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.stages.throughput import report_stragglers
from tulu_hpc.telemetry import memory
from tulu_hpc.telemetry.step_clock import PHASES, Marks, StepClock
from tulu_hpc.training.step import StepResult

ModelPhase = Literal["reference", "old_logprobs", "values", "train", "value_train"]
MODEL_PHASES: tuple[ModelPhase, ...] = ("reference", "old_logprobs", "values", "train", "value_train")


@dataclass(frozen=True)
class Figures:
    """What a phase had to do, all ranks together.

    Attributes:
        rows, targets: tokens read and scored.
        useful, done: FLOPs without and with recomputation.
    """

    rows: int = 0
    targets: int = 0
    useful: int = 0
    done: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.rows + other.rows,
            self.targets + other.targets,
            self.useful + other.useful,
            self.done + other.done,
        )


def forward_figures(architecture: Architecture, packs: Iterable[PackedBatch]) -> Figures:
    """Of one forward pass over these packs."""
    packs = list(packs)
    work = packs_work(packs)
    flops = forward_flops(architecture, work).total
    return Figures(work.rows, sum(each.num_targets for each in packs), flops, flops)


def trained_figures(architecture: Architecture, results: Iterable[StepResult], recompute: Recompute) -> Figures:
    """Of these optimizer steps."""
    results = list(results)
    work = sum((each.work for each in results), Work())
    useful, done = model_flops(architecture, work), hardware_flops(architecture, work, recompute)
    return Figures(work.rows, sum(each.targets for each in results), useful, done)


@dataclass
class RolloutThroughput:
    """Times the phases of a step and tells its figures; one per process.

    Attributes:
        clock: of all trainers of the run.
        directory: of the run.
        peak_flops: of all processes together (`throughput.total_peak`), of the policy and of the value model.
    """

    groups: Groups
    telemetry: TelemetrySection
    directory: Path
    clock: StepClock
    peak_flops: float
    value_peak_flops: float = 0.0
    _marks: dict[ModelPhase, list[Marks]] = field(default_factory=dict)
    _own: list[float] = field(default_factory=list)

    @contextmanager
    def phase(self, name: ModelPhase) -> Iterator[None]:
        """The block is a part of this step's phase `name`."""
        self.clock.start()
        yield
        self._marks.setdefault(name, []).append(self.clock.stop())

    def metrics(self, step: int, figures: dict[ModelPhase, Figures]) -> dict[str, float]:
        """Figures of the step whose phases were timed since the last call. Collective.

        `perf/...` and `timing/train/...` are of training the policy, as in sft; `perf/PHASE/...`, `timing/PHASE/...` of
        the others. Times are means over ranks, memory is that of the worst rank.

        Args:
            figures: of every phase that the step had, the same on every rank.
        """
        names = [name for name in MODEL_PHASES if name in figures]
        mine = [[sum(each) for each in zip(*map(self._seconds, self._marks[name]), strict=True)] for name in names]
        self._own.append(sum(sum(times) - times[PHASES.index("communication")] for times in mine))
        self._marks = {}
        times_NP = torch.tensor(mine, dtype=torch.float64, device=default_device()).view(len(names), len(PHASES))
        peaks = memory.peaks(reset=True)
        worst = torch.tensor([*peaks.values()], dtype=torch.float64, device=default_device())
        if self.groups.world_size > 1:
            dist.all_reduce(times_NP)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        found: dict[str, float] = dict(zip(peaks, worst.tolist(), strict=True))
        for name, times in zip(names, (times_NP / self.groups.world_size).tolist(), strict=True):
            found |= self._figures_of(name, figures[name], times)
        if step % self.telemetry.straggler_every == 0:
            ratio = self.telemetry.straggler_ratio
            found |= report_stragglers(self.groups, self._own, step, self.directory, ratio)
            self._own = []
        return found

    def _figures_of(self, name: ModelPhase, figures: Figures, times: list[float]) -> dict[str, float]:
        seconds, ranks = sum(times), self.groups.world_size
        peak = self.value_peak_flops if name in ("values", "value_train") else self.peak_flops
        perf = {
            "tokens_per_second_per_gpu": figures.rows / seconds / ranks,
            "targets_per_second_per_gpu": figures.targets / seconds / ranks,
            "tflops_per_gpu": figures.useful / seconds / ranks / 1e12,
            "mfu": figures.useful / seconds / peak,
        }
        trains = name in ("train", "value_train")
        if trains:
            perf["hfu"] = figures.done / seconds / peak
        prefix = "perf/" if name == "train" else f"perf/{name}/"
        shown = PHASES if trains else ("forward", "communication", "other")
        return {
            **{f"{prefix}{key}": value for key, value in perf.items()},
            **{f"timing/{name}/{phase}": t for phase, t in zip(PHASES, times, strict=True) if phase in shown},
        }

    def _seconds(self, marks: Marks) -> list[float]:
        return [*self.clock.seconds(marks).values()]
