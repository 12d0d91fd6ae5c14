"""One optimizer step: prepare, forward and backward, update, metrics."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tulu_hpc.data.flops import Work, packs_work
from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.training.non_finite import LossWatch, NonFiniteError, raise_non_finite
from tulu_hpc.training.optimizer import gradient_norm, update_parameters
from tulu_hpc.training.runner import LossFn
from tulu_hpc.training.spike import SpikeError
from tulu_hpc.training.trainer import Trainer

__all__ = ["NonFiniteError", "SpikeError", "StepResult", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks.

    step: optimizer steps done, this one included. lr: used by this step. metrics: quotients of the objective's sums,
    without those that no rank counted anything for. rows: tokens read by the network, padding included. targets: tokens
    scored. seconds: wall clock of this rank.
    stop_requested: some rank was asked to stop. work: of the global batch, for its FLOPs. skipped: the gradient norm
    was a spike and no parameter was changed; skipped_steps counts such steps since the start of the run.
    """

    step: int
    grad_norm: float
    lr: float
    metrics: dict[str, float]
    rows: int
    targets: int
    seconds: float
    stop_requested: bool
    work: Work
    skipped: bool
    skipped_steps: int

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
        NonFiniteError: a loss or the gradient norm is NaN or infinite; names module, rank and samples.
        SpikeError: the gradient norm jumped and optimizer.spike does not let it pass.
    """
    started = time.perf_counter()
    clock, groups = trainer.clock, trainer.groups
    trainer.zero_grad()
    with clock.phase("data"):
        batches = trainer.runner.prepare(packs)
    losses = LossWatch()
    with trainer.watch.probe(trainer.models, batches) as probe:
        terms = trainer.runner.forward_backward(batches, losses.around(loss_fn))
    # Before the update: with it a bad loss is known to all ranks while the parameters are still good.
    totals = _reduce(trainer, terms, packs, losses.count(), stop_requested)
    with clock.phase("optimizer"):
        grad_norm = math.nan if totals.non_finite else gradient_norm(trainer.optimizer, groups)
    if not math.isfinite(grad_norm):

        def repeat() -> None:
            trainer.zero_grad()
            trainer.runner.forward_backward(batches, loss_fn)

        raise_non_finite(
            step=trainer.step + 1,
            grad_norm=grad_norm,
            groups=groups,
            models=trainer.models,
            batches=batches,
            losses=losses,
            probe=probe,
            repeat=repeat,
            directory=trainer.watch.directory,
        )
    lr = trainer.schedule.lr_at(trainer.step)
    trainer.set_lr(lr)
    skipped = trainer.spikes.is_spike(grad_norm)
    if skipped:
        _refuse(trainer, packs, grad_norm)
    else:
        trainer.spikes.accept(grad_norm)
        with clock.phase("optimizer"):
            update_parameters(trainer.optimizer, grad_norm)
    trainer.step += 1
    return StepResult(
        step=trainer.step,
        grad_norm=grad_norm,
        lr=lr,
        metrics=totals.metrics,
        rows=totals.work.rows,
        targets=totals.targets,
        seconds=time.perf_counter() - started,
        stop_requested=totals.stop_requested,
        work=totals.work,
        skipped=skipped,
        skipped_steps=trainer.spikes.skipped,
    )


def _refuse(trainer: Trainer, packs: Sequence[PackedBatch], grad_norm: float) -> None:
    """Leave this step out, or stop; the samples of all ranks are named once. Collective."""
    groups, step = trainer.groups, trainer.step + 1
    shares = groups.all_gather_object([each for pack in packs for each in pack.item_ids])
    samples = list(dict.fromkeys(each for share in shares for each in share))
    try:
        trainer.spikes.refuse(step, grad_norm)
    except SpikeError as error:
        raise SpikeError(f"{error}; samples: {', '.join(samples)}") from None
    if groups.is_main:
        text = f"step {step} left out: gradient norm {grad_norm:.6g}, allowed {trainer.spikes.limit:.6g}"
        print(f"{text}; samples: {', '.join(samples)}", file=sys.stderr, flush=True)


_FIXED = 6  # numbers before the metrics: stop, not finite, rows, pairs, head rows, targets


@dataclass(frozen=True)
class _Totals:
    metrics: dict[str, float]
    work: Work
    targets: int
    non_finite: int
    stop_requested: bool


def _reduce(
    trainer: Trainer, terms: Sequence[Terms], packs: Sequence[PackedBatch], non_finite: int, stop_requested: bool
) -> _Totals:
    """Sum every metric over micro-batches and ranks: one all-reduce over the job, which also is the broadcast from the
    last stage (the other stages and tensor-parallel replicas add zeros) and carries the stop flags and how many losses
    are not finite."""
    groups, device = trainer.groups, trainer.runner.device
    if not trainer.metric_names:
        trainer.metric_names = max(groups.all_gather_object(list(terms[0].metrics) if terms else []), key=len)
    names = trainer.metric_names
    values = torch.zeros(_FIXED + 2 * len(names), dtype=torch.float64, device=device)
    values[0], values[1] = float(stop_requested), float(non_finite)
    if groups.is_last_stage and groups.tp_rank == 0:
        if groups.cp_rank == 0:
            work = packs_work(packs)
            targets = sum(each.num_targets for each in packs)
            numbers = (work.rows, work.pairs, work.head_rows, targets)
            values[2:_FIXED] = torch.tensor(numbers, dtype=torch.float64, device=device)
        for each in terms:
            if list(each.metrics) != names:
                raise ValueError(f"metrics changed during the run: {names} -> {list(each.metrics)}")
            flat_terms = [x for metric in each.metrics.values() for x in metric]
            if flat_terms:
                columns = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in flat_terms]
                values[_FIXED:] += torch.stack(columns)
    if groups.world_size > 1:
        dist.all_reduce(values)
    stop, bad, rows, pairs, head_rows, targets, *flat = values.tolist()
    quotients = {name: total / count for name, total, count in zip(names, flat[0::2], flat[1::2], strict=True) if count}
    return _Totals(quotients, Work(int(rows), int(pairs), int(head_rows)), int(targets), int(bad), stop > 0)
