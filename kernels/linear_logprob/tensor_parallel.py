"""Tensor-parallel pieces of linear_logprob: what crosses ranks, and the merge of the shards' statistics.

Every rank computes the same loss from the merged values, so the gradient of a gathered value is the slice of its owner.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A shard whose maximum is this far below the global one contributes exactly 0; the bound keeps products finite.
_FAR_BELOW = -1e6


class CopyToRanks(torch.autograd.Function):
    """Identity; the backward pass sums the gradient over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class GatherRows(torch.autograd.Function):
    """Concatenates equal row shards over the group; the backward pass reduce-scatters the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


class GatherStatistics(torch.autograd.Function):
    """[K, 4] of this rank -> [ranks, K, 4] of all; the backward pass takes this rank's slice."""

    @staticmethod
    def forward(ctx: Any, stats_K4: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = group.rank()
        out = stats_K4.new_empty(group.size(), *stats_K4.shape)
        dist.all_gather_into_tensor(out.view(-1), stats_K4.contiguous().view(-1), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


def merge(stats_RK4: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs [K] and entropies [K] from the statistics of every shard (columns: `blocks`)."""
    if stats_RK4.shape[0] == 1:
        maximum, log_sum, centred, picked = stats_RK4[0].unbind(-1)
        return picked - maximum.detach() - log_sum, (log_sum - centred if with_entropy else None)
    maximum, log_sum, centred, picked = stats_RK4.unbind(-1)
    maximum = maximum.detach()
    top_K = maximum.amax(0)
    shift = (maximum - top_K).clamp(min=_FAR_BELOW)
    parts = log_sum + shift
    log_total_K = parts.logsumexp(0)
    # Exactly one shard holds a target; the others carry -inf.
    logprobs_K = picked.amax(0) - top_K - log_total_K
    if not with_entropy:
        return logprobs_K, None
    share = (parts - log_total_K).exp()
    return logprobs_K, log_total_K - (share * (centred + shift)).sum(0)
