"""Tensor-parallel pieces of linear_logprob: what crosses ranks, and the merge of the shards' statistics.

Every rank computes the same loss from the merged values, so the gradient of a gathered value is the slice of its owner.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.kernels.linear_logprob.problem import spread_rows

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
    """Sum of the gradient of hidden over the ranks, begun by `start` and finished by `wait`: `problem.HiddenGradient`.

    The gradient of the used rows is written to the front of that of all rows, and moves to its places within it.

    Args:
        hidden_TH: the operand whose gradient is wanted; only its shape is used.
        rows_U: the used rows, ascending; None for all.
        group: name of the process group, "" for one rank.
        scatter: hidden is this rank's slice of the rows (sequence parallelism).
    """

    def __init__(self, hidden_TH: Tensor, rows_U: Tensor | None, group: str, scatter: bool) -> None:
        self._hidden, self._rows_U, self._scatter = hidden_TH, rows_U, scatter
        self._group = _group(group) if group else None
        self._work: dist.Work | None = None
        # Of all rows; under `scatter` those of all ranks, kept until the collective is over, which reads it on another
        # stream.
        self._all: Tensor | None = None
        self._mine: Tensor | None = None

    def rows_UH(self) -> Tensor:
        if self._all is None:
            ranks = self._group.size() if self._group is not None and self._scatter else 1
            self._all = self._hidden.new_empty(len(self._hidden) * ranks, self._hidden.shape[1])
        return self._all if self._rows_U is None else self._all[: len(self._rows_U)]

    def start(self) -> None:
        """Begins the all-reduce of the used rows, or under `scatter` the reduce-scatter of all rows."""
        rows_UH = self.rows_UH()
        assert self._all is not None
        if self._group is not None and self._scatter:
            self._spread()
            self._mine = self._all.new_empty(self._hidden.shape)
            self._work = dist.reduce_scatter_tensor(self._mine, self._all, group=self._group, async_op=True)
        elif self._group is not None:
            self._work = dist.all_reduce(rows_UH, group=self._group, async_op=True)

    def wait(self) -> Tensor:
        """The gradient of hidden_TH."""
        assert self._all is not None, "start was not called"
        if self._work is not None:
            self._work.wait()
        if self._mine is not None:
            return self._mine
        self._spread()
        return self._all

    def _spread(self) -> None:
        if self._rows_U is not None and self._all is not None:
            spread_rows(self._all, self._rows_U)


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
