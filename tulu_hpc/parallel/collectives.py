"""Collectives whose gradient is not what autograd would guess."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `x` over the ranks of `group`; the gradient of the sum passes to `x` unchanged.

    For quantities like the log-prob of a sequence whose tokens lie on several context-parallel ranks: every rank
    computes the same loss of the same sum, each backpropagates through its own addend, and the gradient sum of data
    parallelism (which runs over context-parallel ranks too) puts the pieces together.

    Args:
        x: any shape; the same shape on every rank.
        group: None or a group of one rank returns `x` itself.
    """
    if group is None or group.size() == 1:
        return x
    return _SumOver.apply(x, group)
