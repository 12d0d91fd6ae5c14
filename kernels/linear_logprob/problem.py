"""What the passes of linear_logprob share: their arguments, the products, and what a backend's row kernels do.

Shapes: T rows of hidden, U rows used, K targets (sorted by row), H hidden, Vl local vocabulary shard, C columns of a
block, A rows of U with a non-zero upstream gradient.

Statistics of target k, `stats_K4[k]`, over the local shard of its row (x = transformed logits):
    0 maximum            m = max_j x_j                     (a constant for the gradient)
    1 log of the sum     log sum_j exp(x_j - m)
    2 centred mean       sum_j softmax(x)_j (x_j - m)
    3 picked             x_target, or -inf when the target is not in this shard
They are all that tensor-parallel ranks have to exchange. With g1, g2, g3 the upstream gradients of 1, 2, 3 summed over
the targets of a row:  dx_j = p_j (g1 + g2 (1 - centred) + g2 (x_j - m)) + [j = target] g3.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_hpc.kernels.linear_logprob import buffers, onednn


class HiddenGradient(Protocol):
    """Takes the gradient of the used rows while the last GEMM of the weight gradient is still to come."""

    def rows_UH(self) -> Tensor:
        """Where to write it; not allocated before the first call."""

    def start(self) -> None:
        """It is written: begin what is to be done with it."""


class RowKernels(Protocol):
    """The row passes of one backend. invariant_rows: rows of a batch-invariant GEMM, None where none is offered."""

    @property
    def name(self) -> str: ...

    @property
    def invariant_rows(self) -> int | None: ...

    def forward(
        self,
        logits_UC: Tensor,
        first: int,
        target_K: Tensor,
        row_start_U1: Tensor,
        state_3U: Tensor,
        picked_K: Tensor,
        inv_temperature: float,
        softcap: float,
    ) -> None:
        """Adds the block (vocabulary ids first:first+C) to the running (max, sum, sum of e^(x-m) (x-m)) of its rows.

        Also writes the transformed logit of each target in the block. Row u owns targets row_start[u]:row_start[u+1].
        """

    def backward(
        self,
        logits_UC: Tensor,
        logits_row_A: Tensor | None,
        out_AC: Tensor,
        first: int,
        target_K: Tensor,
        row_start_A1: Tensor,
        stats_K4: Tensor,
        grad_K4: Tensor,
        inv_temperature: float,
        softcap: float,
    ) -> None:
        """Writes the gradient of the block's logits to `out_AC`.

        Row a reads row logits_row[a] of the logits (None: row a; `out_AC` may then be the logits when dtypes agree). A
        row without targets gets zeros.
        """


@dataclass(frozen=True)
class Problem:
    """Arguments that the forward and the backward pass share.

    rows_U: the rows of hidden that are used, ascending; None for all. invariant_rows: of the GEMMs of a batch-invariant
    forward pass, 0 for another one. onednn: fp32 products by oneDNN where it suits them.
    """

    hidden_TH: Tensor
    weight_VlH: Tensor
    target_K: Tensor
    row_start_U1: Tensor
    inv_temperature: float
    softcap: float
    vocab_start: int
    max_buffer_bytes: int
    onednn: bool = False
    rows_U: Tensor | None = None
    invariant_rows: int = 0

    @property
    def rows(self) -> int:
        """U."""
        return len(self.row_start_U1) - 1

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden_TH.dtype == torch.float64 else torch.float32

    @property
    def half_gemm(self) -> bool:
        """Whether bf16 operands go into the GEMM as they are: where it can write fp32 (CUDA). Else they are widened."""
        return self.hidden_TH.is_cuda and self.hidden_TH.dtype == torch.bfloat16

    def sizes(self) -> buffers.Sizes:
        vocab, hidden = self.weight_VlH.shape
        return buffers.Sizes(
            self.rows,
            hidden,
            vocab,
            self.hidden_TH.dtype.itemsize,
            self.hidden_TH.is_cuda or self.half_gemm,
            self.onednn,
            self.rows_U is not None,
            self.invariant_rows,
        )

    def plan(self, allow_keep: bool) -> buffers.Plan:
        return buffers.plan_buffers(self.sizes(), self.max_buffer_bytes, allow_keep)

    def used_rows(self) -> Tensor:
        """[U, H], a copy where they are not all."""
        return self.hidden_TH if self.rows_U is None else self.hidden_TH.index_select(0, self.rows_U)

    def hidden(self, length: int) -> "Operand":
        """The used rows of hidden, up to so many at once."""
        return Operand(self, self.hidden_TH, length, self.rows_U)

    def weight(self, length: int) -> "Operand":
        return Operand(self, self.weight_VlH, length)

    def gemm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a @ b in the compute dtype."""
        if self.half_gemm:
            torch.mm(a, b, out_dtype=self.compute_dtype, out=out)
        elif self.onednn and onednn.suits(a, b):
            onednn.exact_product(a, b, out)
        else:
            torch.mm(a, b, out=out)

    def gemm_add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b in the compute dtype."""
        if self.half_gemm:
            torch.addmm(total, a, b, out_dtype=self.compute_dtype, out=total)
        elif self.onednn and onednn.suits(a, b):
            onednn.add_product(total, a, b)
        else:
            total.addmm_(a, b)

    def gemm_half(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a @ b from bf16 to bf16; the GEMM sums in fp32."""
        with _sums_in_fp32():
            torch.mm(a, b, out=out)


_switch = threading.Lock()


@contextmanager
def _sums_in_fp32() -> Iterator[None]:
    """Keeps cuBLAS from adding in bf16 the parts of a sum that it splits over blocks, as torch lets it by default."""
    flags = torch.backends.cuda.matmul
    with _switch:  # autograd has a thread per device, the switch is one for all
        allowed = flags.allow_bf16_reduced_precision_reduction
        try:
            if allowed:
                flags.allow_bf16_reduced_precision_reduction = False
            yield
        finally:
            if allowed:
                flags.allow_bf16_reduced_precision_reduction = True


class Operand:
    """Slices of a matrix for the GEMM: views, or copies in one buffer that is used again.

    Copies where they must be widened to the compute dtype, or where `rows` of the matrix are picked.
    """

    def __init__(self, problem: Problem, matrix: Tensor, length: int, rows: Tensor | None = None) -> None:
        self._matrix, self._rows = matrix, rows
        self._slice = (0, 0)
        dtype = matrix.dtype if problem.half_gemm else problem.compute_dtype
        shape = min(length, len(matrix) if rows is None else len(rows)), matrix.shape[1]
        copies = rows is not None or matrix.dtype != dtype
        self._buffer = matrix.new_empty(shape, dtype=dtype) if copies else None

    def __call__(self, start: int, stop: int) -> Tensor:
        if self._buffer is None:
            return self._matrix[start:stop]
        out = self._buffer[: stop - start]
        if self._slice != (start, stop):
            copy_rows(self._matrix, self._rows, start, stop, out)
            self._slice = (start, stop)
        return out


def copy_rows(matrix: Tensor, rows: Tensor | None, start: int, stop: int, out: Tensor) -> None:
    """Rows start:stop, or those of `rows` at start:stop, to `out` in its dtype."""
    if rows is None:
        out.copy_(matrix[start:stop])
    elif out.dtype == matrix.dtype and out.is_contiguous():
        torch.index_select(matrix, 0, rows[start:stop], out=out)
    else:
        out.copy_(matrix.index_select(0, rows[start:stop]))


def spread_rows(x: Tensor, rows: Tensor) -> None:
    """Moves row i to row rows[i], in place and some at a time; the rows that nothing moved to become 0.

    rows: ascending, without duplicates; the rows of x behind the first len(rows) have no value yet.
    """
    at_once = buffers.moved_rows(x.is_cuda)
    for stop in range(len(rows), 0, -at_once):
        start = max(0, stop - at_once)
        # rows[i] >= i: no row before `start` is overwritten.
        x.index_copy_(0, rows[start:stop], x[start:stop].clone())
    unused = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill_(0, rows, False)
    x.masked_fill_(unused[:, None], 0)


def per_target(per_row_U3: Tensor, row_start_U1: Tensor, picked_K: Tensor) -> Tensor:
    """stats_K4 from the first three statistics of each row and the picked logits."""
    counts = row_start_U1.diff()
    return torch.cat((per_row_U3.repeat_interleave(counts, 0, output_size=len(picked_K)), picked_K[:, None]), 1)


def drop_zero_rows(
    problem: Problem, stats_K4: Tensor, grad_K4: Tensor
) -> tuple[Problem, Tensor, Tensor, Tensor | None]:
    """Problem, statistics and gradients without the rows whose upstream gradient is exactly zero.

    The last value is the rows of U that are left, None when all are.
    """
    passed_K1 = F.pad((grad_K4[:, 1:] != 0).any(1).cumsum(0), (1, 0))
    active_U = passed_K1[problem.row_start_U1].diff() > 0
    if bool(active_U.all()):
        return problem, stats_K4, grad_K4, None
    rows_A = active_U.nonzero()[:, 0]
    counts_U = problem.row_start_U1.diff()
    k = active_U.repeat_interleave(counts_U, output_size=len(grad_K4)).nonzero()[:, 0]
    fewer = replace(
        problem,
        rows_U=rows_A if problem.rows_U is None else problem.rows_U[rows_A],
        target_K=problem.target_K[k],
        row_start_U1=F.pad(counts_U[rows_A].cumsum(0), (1, 0)),
    )
    return fewer, stats_K4[k], grad_K4[k], rows_A
