"""Packs through a model, at any layout: megatron's pipeline schedule drives the forward (and backward) passes.

Shapes: T rows of a pack, K scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.data.packed_batch import PackedBatch, pack
from tulu_hpc.models.build import local_heads
from tulu_hpc.models.llama import TokenLogprobs, score
from tulu_hpc.models.scalar_head import RowValues
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.context import RankBatch, Split, rank_batch
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups, Layout
from tulu_hpc.telemetry.step_clock import StepClock
from tulu_hpc.training.timing import watch_schedule

# What the last stage returned (TokenLogprobs, or RowValues of a scalar head) and its micro-batch -> their terms.
LossFn = Callable[[Any, RankBatch], Terms]


def row_multiple(layout: Layout, split: Split = "greedy") -> int:
    """The number of rows of a pack must be a multiple of this (`pack(multiple=...)`)."""
    return layout.row_multiple * (2 if split == "zigzag" and layout.context > 1 else 1)


def target_values(output: RowValues, batch: RankBatch) -> Tensor:
    """[Kr] value at the row before each target of this rank, differentiable."""
    row_K = batch.params.row_K
    assert row_K is not None
    return output.values_T[row_K]


@dataclass
class Runner:
    """A model's chunks and what is needed to feed them; the model may be wrapped in megatron DDP or not."""

    chunks: list[nn.Module]
    groups: Groups
    heads: int
    kv_heads: int
    head_dim: int
    split: Split
    strategy: Literal["repeat", "merge"] | None
    device: torch.device

    @classmethod
    def create(
        cls,
        chunks: Sequence[nn.Module],
        groups: Groups,
        architecture: Architecture,
        *,
        split: Split = "greedy",
        strategy: Literal["repeat", "merge"] | None = None,
    ) -> Runner:
        heads, kv_heads = local_heads(architecture, groups.layout)
        return cls(
            list(chunks), groups, heads, kv_heads, architecture.head_dim, split, strategy, device=default_device()
        )

    def __post_init__(self) -> None:
        layout = self.groups.layout
        self._forward_backward = get_forward_backward_func(layout.pipeline, layout.virtual_pipeline)
        self._config = get_model_config(self.chunks[0])
        self._config.calculate_per_token_loss = True  # else megatron divides our loss by what it believes are tokens
        if layout.virtual_pipeline:
            # The batched exchange pairs messages by order alone and sends both directions in one call, which two stages
            # that are each other's previous AND next stage get wrong; this is also the mode that overlaps.
            self._config.batch_p2p_comm, self._config.overlap_p2p_comm = False, True
        self._p2p = P2PCommunicator(self.groups.pg.pp, self._config) if layout.pipeline > 1 else None

    def use_clock(self, clock: StepClock) -> None:
        """Tell this clock when a micro-batch is computed forward and backward."""
        watch_schedule(self._config, clock)

    def prepare(self, packs: Sequence[PackedBatch]) -> list[RankBatch]:
        """This rank's part of each pack. The interleaved schedule needs whole groups of micro-batches, and every
        schedule at least one: empty packs are added, which change no sum."""
        layout = self.groups.layout
        packs = list(packs)
        group = layout.pipeline if layout.virtual_pipeline else 1
        missing = -len(packs) % group if packs else group
        if missing:
            packs += [pack([], multiple=row_multiple(layout, self.split))] * missing
        shape: dict[str, Any] = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return [
            rank_batch(each, self.groups, **shape, device=self.device, split=self.split, strategy=self.strategy)
            for each in packs
        ]

    def forward_backward(self, batches: Sequence[RankBatch], loss_fn: LossFn) -> list[Terms]:
        """One forward and backward pass over all micro-batches; on the last stage the terms of each, detached.

        Gradients are then reduced over all ranks by the model config's `finalize_model_grads_func`.
        """

        def loss(batch: RankBatch, output: TokenLogprobs | RowValues) -> tuple[Tensor, int, Terms]:
            terms = loss_fn(output, batch)
            return terms.loss, 0, Terms(terms.loss.detach(), terms.metrics)

        return self._run(batches, loss, forward_only=False)

    def logprobs(self, packs: Sequence[PackedBatch]) -> list[Tensor]:
        """Log-probs of each pack's targets, [K] fp32 in the pack's order, on every rank of the replica."""
        return self._per_target(packs, lambda output, batch: output.logprobs_K)

    def values(self, packs: Sequence[PackedBatch]) -> list[Tensor]:
        """Of a model with a scalar head: the value of the state in which each target was chosen (that of the row
        before it), [K] fp32 in the pack's order, on every rank of the replica."""
        return self._per_target(packs, target_values)

    @torch.no_grad()
    def _per_target(self, packs: Sequence[PackedBatch], read: Callable[[Any, RankBatch], Tensor]) -> list[Tensor]:
        def collect(batch: RankBatch, output: Any) -> tuple[Tensor, int, Tensor]:
            mine = read(output, batch)
            if self.groups.cp_size == 1:
                return mine.new_zeros(()), 0, mine
            whole = mine.new_zeros(batch.keep_K.shape[0])
            whole[batch.keep_K] = mine
            return mine.new_zeros(()), 0, whole

        packs = list(packs)
        stored = self._run(self.prepare(packs), collect, forward_only=True)
        sizes = [each.num_targets for each in packs]
        # One collective for all packs, whatever their number.
        flat = torch.cat(stored)[: sum(sizes)] if stored else torch.zeros(sum(sizes), device=self.device)
        if self.groups.cp_size > 1 and self.groups.is_last_stage:
            dist.all_reduce(flat, group=self.groups.pg.cp)
        if self.groups.pp_size > 1:
            group = self.groups.pg.pp
            dist.broadcast(flat, src=dist.get_global_rank(group, group.size() - 1), group=group)
        return list(flat.split(sizes))

    def _run(self, batches: Sequence[RankBatch], loss: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        def forward_step(iterator: Iterator[RankBatch], chunk: nn.Module) -> tuple[Any, Callable[..., Any]]:
            batch = next(iterator)
            return score(chunk, batch), partial(loss, batch)

        stored: list[Any] = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=1,  # shapes travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=self._p2p,
            pg_collection=self.groups.pg,
        )
        return stored
