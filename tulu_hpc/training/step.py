"""One optimizer step: prepare, forward and backward, update, metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.training.runner import LossFn
from tulu_hpc.training.trainer import Trainer


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite; the parameters of this process are spoilt, the last checkpoint is not."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks.

    step: optimizer steps done, this one included. lr: used by this step. metrics: quotients of the objective's sums,
    without those that no rank counted anything for. rows: tokens read by the network, padding included. targets: tokens
    scored. seconds: wall clock of this rank.
    stop_requested: some rank was asked to stop.
    """

    step: int
    grad_norm: float
    lr: float
    metrics: dict[str, float]
    rows: int
    targets: int
    seconds: float
    stop_requested: bool

    @property
    def loss(self) -> float:
        """The metric `loss` of the objective; NaN when the global batch had nothing to count."""
        return self.metrics.get("loss", math.nan)


def train_step(
    trainer: Trainer, packs: Sequence[PackedBatch], loss_fn: LossFn, *, stop_requested: bool = False
) -> StepResult:
    """Move the model one optimizer step on this data-parallel rank's share of the global batch.

    Args:
        packs: micro-batches of this data-parallel rank; ranks may have different numbers of them, also none.
        loss_fn: (TokenLogprobs, RankBatch) -> Terms, divided by global denominators already.
        stop_requested: this process was asked to stop; told to all ranks with the metrics.

    Raises:
        NonFiniteError: the gradient norm is NaN or infinite.
    """
    started = time.perf_counter()
    trainer.zero_grad()
    batches = trainer.runner.prepare(packs)
    terms = trainer.runner.forward_backward(batches, loss_fn)
    lr = trainer.schedule.lr_at(trainer.step)
    trainer.set_lr(lr)
    _, grad_norm, _ = trainer.optimizer.step()
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"step {trainer.step + 1}: the gradient norm is {grad_norm}; resume from the last checkpoint"
        )
    trainer.step += 1
    totals = _reduce(trainer, terms, packs, stop_requested)
    return StepResult(
        step=trainer.step,
        grad_norm=float(grad_norm),
        lr=lr,
        metrics=totals.metrics,
        rows=totals.rows,
        targets=totals.targets,
        seconds=time.perf_counter() - started,
        stop_requested=totals.stop_requested,
    )


@dataclass(frozen=True)
class _Totals:
    metrics: dict[str, float]
    rows: int
    targets: int
    stop_requested: bool


def _reduce(trainer: Trainer, terms: Sequence[Terms], packs: Sequence[PackedBatch], stop_requested: bool) -> _Totals:
    """Sum every metric over micro-batches and ranks: one all-reduce over the job, which also is the broadcast from the
    last stage (the other stages and tensor-parallel replicas add zeros) and carries the stop flags."""
    groups, device = trainer.groups, trainer.runner.device
    if not trainer.metric_names:
        trainer.metric_names = max(groups.all_gather_object(list(terms[0].metrics) if terms else []), key=len)
    names = trainer.metric_names
    values = torch.zeros(3 + 2 * len(names), dtype=torch.float64, device=device)
    values[0] = float(stop_requested)
    if groups.is_last_stage and groups.tp_rank == 0:
        if groups.cp_rank == 0:
            values[1] = sum(each.num_rows for each in packs)
            values[2] = sum(each.num_targets for each in packs)
        for each in terms:
            if list(each.metrics) != names:
                raise ValueError(f"metrics changed during the run: {names} -> {list(each.metrics)}")
            flat_terms = [x for metric in each.metrics.values() for x in metric]
            values[3:] += torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in flat_terms])
    if groups.world_size > 1:
        dist.all_reduce(values)
    stop, rows, targets, *flat = values.tolist()
    quotients = {name: total / count for name, total, count in zip(names, flat[0::2], flat[1::2], strict=True) if count}
    return _Totals(quotients, int(rows), int(targets), stop > 0)
