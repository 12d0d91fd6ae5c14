"""What every objective returns, and the sequence sums they share.

Shapes: K scored tokens of this rank, Q sequences of the pack.

A loss here is already divided by the denominators of the *global* batch, so the gradient of the batch is the plain sum
of the gradients over micro-batches, context-parallel and data-parallel ranks, whatever the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_hpc.kernels.preference_loss import reference
from tulu_hpc.parallel.collectives import sum_over
from tulu_hpc.parallel.context import RankBatch

Metric = tuple[Tensor, Tensor | float]


@dataclass(frozen=True)
class Terms:
    """One micro-batch's share of the loss, and of the metrics.

    loss: scalar tensor that carries the gradient.
    metrics: name -> (sum, count); both are added over micro-batches, context- and data-parallel ranks, and the metric
        is their quotient.
    """

    loss: Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)


def sequence_sums(
    logprobs_K: Tensor, sequence_id_K: Tensor, num_sequences: int, cp_group: ProcessGroup | None = None
) -> Tensor:
    """Sum of log-probs per sequence, [Q], over the context-parallel ranks that hold parts of it.

    The all-reduce has the identity as its backward: every context-parallel rank computes the same loss from the same
    sums, and the gradient sum over those ranks then adds each rank's own tokens exactly once.
    """
    sums_Q = reference.sequence_sums(logprobs_K, sequence_id_K, num_sequences)
    if cp_group is not None and cp_group.size() > 1:
        sums_Q = sum_over(sums_Q, cp_group)
    return sums_Q.to(logprobs_K.dtype)


def sequence_lengths(sequence_id_K: Tensor, num_sequences: int) -> Tensor:
    """Scored tokens per sequence, [Q] fp32; `sequence_id_K` of the whole pack, not of one rank's share."""
    return torch.bincount(sequence_id_K, minlength=num_sequences).to(torch.float32)


def own_targets(column_K: Tensor, batch: RankBatch) -> Tensor:
    """The entries of a column of the whole pack that belong to this context-parallel rank's targets."""
    return column_K if column_K.shape[0] == batch.target_K.shape[0] else column_K[batch.keep_K]
