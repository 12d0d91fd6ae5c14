"""Tensor-parallel pieces of linear_logprob: what crosses ranks, and the merge of the shards' statistics.

Every rank computes the same loss from the merged values, so the gradient of a gathered value is the slice of its owner.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# A shard whose maximum is this far below the global one contributes exactly 0; the bound keeps products finite.
_FAR_BELOW = -1e6


def _group(name: str) -> dist.ProcessGroup:
    # Not public, but what torch's own functional collectives use.
    resolve: Callable[[str], dist.ProcessGroup] = cast(Any, dist.distributed_c10d)._resolve_process_group
    return resolve(name)


def gather_rows(x: Tensor, group: str) -> Tensor:
    """Concatenates the equal row shards of the ranks."""
    ranks = _group(group)
    out = x.new_empty(x.shape[0] * ranks.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=ranks)
    return out


class HiddenReduction:
    """Sum of the gradient of hidden over the ranks, begun by `start` and finished by `wait`.

    Args:
        hidden_TH: the operand whose gradient is wanted; only its shape is used.
        rows_U: row of each gradient that `start` gets, None for all in order.
        group: name of the process group, "" for one rank.
        scatter: hidden is this rank's slice of the rows (sequence parallelism).
    """

    def __init__(self, hidden_TH: Tensor, rows_U: Tensor | None, group: str, scatter: bool) -> None:
        self._shape, self._rows_U, self._scatter = hidden_TH.shape, rows_U, scatter
        self._group = _group(group) if group else None
        self._work: dist.Work | None = None
        self._source: Tensor | None = None
        self._result: Tensor | None = None

    def start(self, grad_UH: Tensor) -> None:
        """Begins the all-reduce of the used rows, or under `scatter` the reduce-scatter of all rows."""
        if self._group is None:
            self._result = grad_UH
        elif not self._scatter:
            self._result = grad_UH
            self._work = dist.all_reduce(grad_UH, group=self._group, async_op=True)
        else:
            rows = self._shape[0] * self._group.size()
            # Kept until the collective is over, which reads it on another stream.
            self._source = self._all_rows(grad_UH, rows)
            self._result = grad_UH.new_empty(self._shape)
            self._work = dist.reduce_scatter_tensor(self._result, self._source, group=self._group, async_op=True)

    def wait(self) -> Tensor:
        """The gradient of hidden_TH."""
        assert self._result is not None, "start was not called"
        if self._work is not None:
            self._work.wait()
        return self._result if self._scatter else self._all_rows(self._result, self._shape[0])

    def _all_rows(self, grad_UH: Tensor, rows: int) -> Tensor:
        if self._rows_U is None:
            return grad_UH
        return grad_UH.new_zeros(rows, self._shape[1]).index_copy_(0, self._rows_U, grad_UH)


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
    """Log-probs [K] and entropies [K] from the statistics of every shard (columns: `problem`)."""
    if stats_RK4.shape[0] == 1:
        maximum, log_sum, centred, picked = stats_RK4[0].unbind(-1)
        return picked - maximum.detach() - log_sum, (log_sum - centred if with_entropy else None)
    maximum, log_sum, centred, picked = stats_RK4.unbind(-1)
    maximum = maximum.detach()
    top_K = maximum.amax(0)
    shift = (maximum - top_K).clamp(min=_FAR_BELOW)
    parts = log_sum + shift
    peak_K = parts.detach().amax(0)
    # Rank by rank, in order: a reduction kernel may add in another order when there are other rows.
    log_total_K = peak_K + functools.reduce(torch.add, (parts - peak_K).exp().unbind(0)).log()
    # Exactly one shard holds a target; the others carry -inf.
    logprobs_K = picked.amax(0) - top_K - log_total_K
    if not with_entropy:
        return logprobs_K, None
    share = (parts - log_total_K).exp()
    return logprobs_K, log_total_K - functools.reduce(torch.add, (share * (centred + shift)).unbind(0))
