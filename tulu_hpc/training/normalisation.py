"""Denominators of the global batch, computed once per optimizer step and before any loss.

Dividing each micro-batch's sum by a global denominator, and only ever summing afterwards, is what makes the gradient
independent of the layout, the number of micro-batches and the packing. A mean of means would weigh tokens by where they
happened to be packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups


@dataclass(frozen=True)
class GlobalCounts:
    """What the whole global batch holds, all data-parallel ranks together."""

    targets: int
    sequences: int


def global_counts(packs: Sequence[PackedBatch], groups: Groups) -> GlobalCounts:
    """Counts of this step's packs summed over data-parallel ranks.

    Not over context-parallel ranks: each of them holds the whole pack's tables, whatever rows it computes.
    """
    counts = [sum(pack.num_targets for pack in packs), sum(pack.num_sequences for pack in packs)]
    if groups.dp_size > 1:
        tensor = torch.tensor(counts, dtype=torch.int64, device=default_device())
        dist.all_reduce(tensor, group=groups.pg.dp)
        counts = tensor.tolist()
    return GlobalCounts(*counts)
