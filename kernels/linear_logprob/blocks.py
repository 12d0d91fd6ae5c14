"""The block loop of linear_logprob: vendor GEMMs into a bounded buffer, one row pass between them.

Shapes: U rows used, K targets (sorted by row), H hidden, Vl local vocabulary shard, C columns of a block, A rows of U
with a non-zero upstream gradient.

Statistics of target k, `stats_K4[k]`, over the local shard of its row (x = transformed logits):
    0 maximum            m = max_j x_j                     (a constant for the gradient)
    1 log of the sum     log sum_j exp(x_j - m)
    2 centred mean       sum_j softmax(x)_j (x_j - m)
    3 picked             x_target, or -inf when the target is not in this shard
They are all that tensor-parallel ranks have to exchange. With g1, g2, g3 the upstream gradients of 1, 2, 3 summed over
the targets of a row:  dx_j = p_j (g1 + g2 (1 - centred) + g2 (x_j - m)) + [j = target] g3.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_hpc.kernels.linear_logprob import onednn

# Columns below which a GEMM block is inefficient: rows are blocked too rather than going under it.
MIN_COLUMNS = 1024
# Scratch columns of the backward pass over kept logits.
SCRATCH_COLUMNS = 4096
# Columns of every block on CPU, which then stays in the cache.
CPU_COLUMNS = 2048
# Rows of one product of the gradient of hidden from kept logits with bf16 operands.
KEPT_ROWS = 2048
# Batch-invariant GEMMs all have this many columns; their operands are padded to multiples of PAD_COLUMNS and
# PAD_HIDDEN, because the vendor GEMM computes ragged edges in another order.
INVARIANT_COLUMNS = 2048
PAD_COLUMNS = 64
PAD_HIDDEN = 16
LOWEST = torch.finfo(torch.float32).min

# Receives the finished gradient of hidden_UH while the last GEMM of the weight gradient is still to come.
HiddenDone = Callable[[Tensor], None]


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
class Blocks:
    """rows x columns of one logits block; `keep`: everything fits in the budget and is kept for the backward pass."""

    rows: int
    columns: int
    keep: bool


def plan_blocks(rows: int, vocab: int, bytes_per_logit: int, max_buffer_bytes: int, allow_keep: bool) -> Blocks:
    """Divides [rows, vocab] logits so that a block never exceeds `max_buffer_bytes`.

    Vocabulary blocks come first (all rows at once: each weight block is read once and its gradient is written once);
    rows are divided as well only when a block would have fewer than MIN_COLUMNS columns.
    """
    budget = max_buffer_bytes // bytes_per_logit
    if budget < 1:
        raise ValueError(f"max_buffer_bytes={max_buffer_bytes} does not hold one logit of {bytes_per_logit} bytes")
    if rows == 0 or vocab == 0:
        return Blocks(max(rows, 1), max(vocab, 1), False)
    scratch = rows * min(vocab, SCRATCH_COLUMNS)
    if allow_keep and rows * vocab + scratch <= budget:
        return Blocks(rows, vocab, True)
    columns = max(min(vocab, budget // rows), min(vocab, MIN_COLUMNS, budget))
    return Blocks(min(rows, budget // columns), columns, False)


@dataclass(frozen=True)
class Problem:
    """Arguments that the forward and the backward pass share."""

    hidden_UH: Tensor
    weight_VlH: Tensor
    target_K: Tensor
    row_start_U1: Tensor
    inv_temperature: float
    softcap: float
    vocab_start: int
    max_buffer_bytes: int
    onednn: bool = False  # fp32 products by oneDNN where it suits them

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden_UH.dtype == torch.float64 else torch.float32

    @property
    def half_gemm(self) -> bool:
        """Whether bf16 operands go into the GEMM as they are: where it can write fp32 (CUDA). Else they are widened."""
        return self.hidden_UH.is_cuda and self.hidden_UH.dtype == torch.bfloat16

    def blocks(self, allow_keep: bool, backward: bool) -> Blocks:
        size = torch.finfo(self.compute_dtype).bits // 8
        # The backward pass with bf16 GEMMs holds a bf16 copy of the block's gradient beside its fp32 logits.
        extra = 2 if backward and self.half_gemm else 0
        return plan_blocks(
            self.hidden_UH.shape[0], self.weight_VlH.shape[0], size + extra, self.max_buffer_bytes, allow_keep
        )

    def columns(self, blocks: Blocks) -> int:
        """Columns of one step: on CPU few enough that the row pass finds the block in the cache."""
        return blocks.columns if self.hidden_UH.is_cuda else min(blocks.columns, CPU_COLUMNS)

    def operand(self, x: Tensor) -> Tensor:
        return x if self.half_gemm else x.to(self.compute_dtype)

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
            total.add_(onednn.product(a, b))
        else:
            total.addmm_(a, b)


def per_target(per_row_U3: Tensor, row_start_U1: Tensor, picked_K: Tensor) -> Tensor:
    """stats_K4 from the first three statistics of each row and the picked logits."""
    counts = row_start_U1.diff()
    return torch.cat((per_row_U3.repeat_interleave(counts, 0, output_size=len(picked_K)), picked_K[:, None]), 1)


def drop_zero_rows(
    problem: Problem, stats_K4: Tensor, grad_K4: Tensor
) -> tuple[Problem, Tensor, Tensor, Tensor | None]:
    """Problem, statistics and gradients without the rows whose upstream gradient is exactly zero.

    The last value is the rows that are left, None when all are.
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
        hidden_UH=problem.hidden_UH[rows_A],
        target_K=problem.target_K[k],
        row_start_U1=F.pad(counts_U[rows_A].cumsum(0), (1, 0)),
    )
    return fewer, stats_K4[k], grad_K4[k], rows_A


def forward(problem: Problem, kernels: RowKernels, keep: bool, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
    """stats_K4 and the logits kept for the backward pass ([U, Vl], or [0, 0] when they are not kept)."""
    hidden, weight = problem.hidden_UH, problem.weight_VlH
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], problem.compute_dtype
    blocks = problem.blocks(allow_keep=keep, backward=False)
    state_3U = hidden.new_zeros(3, rows, dtype=dtype)
    state_3U[0] = LOWEST
    picked_K = hidden.new_full((len(problem.target_K),), -torch.inf, dtype=dtype)
    kept = hidden.new_empty((rows, vocab) if blocks.keep else (0, 0), dtype=dtype)

    def row_pass(logits: Tensor, r0: int, c0: int) -> None:
        kernels.forward(
            logits,
            problem.vocab_start + c0,
            problem.target_K,
            problem.row_start_U1[r0 : r0 + len(logits) + 1],
            state_3U[:, r0 : r0 + len(logits)],
            picked_K,
            problem.inv_temperature,
            problem.softcap,
        )

    if batch_invariant:
        _invariant_products(problem, kernels, kept if blocks.keep else None, row_pass)
    else:
        columns = problem.columns(blocks)
        buffer = hidden.new_empty(0 if blocks.keep or not (rows and vocab) else blocks.rows * columns, dtype=dtype)
        for c0 in range(0, vocab, columns):
            weight_CH = problem.operand(weight[c0 : c0 + columns])
            for r0 in range(0, rows, blocks.rows):
                r1, c1 = min(r0 + blocks.rows, rows), c0 + len(weight_CH)
                if blocks.keep:
                    logits = kept[:, c0:c1]
                else:
                    logits = buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
                problem.gemm(problem.operand(hidden[r0:r1]), weight_CH.T, logits)
                row_pass(logits, r0, c0)
    maximum, total, dot = state_3U
    # An empty shard has sum 0: log 1 and mean 0 beside the lowest maximum make it vanish in the merge.
    total = total.where(total != 0, 1)
    return per_target(torch.stack((maximum, total.log(), dot / total), 1), problem.row_start_U1, picked_K), kept


def _invariant_products(
    problem: Problem, kernels: RowKernels, kept: Tensor | None, row_pass: Callable[[Tensor, int, int], None]
) -> None:
    """Logits by GEMMs of one fixed shape, on copies of the operands that are padded with zeros."""
    hidden, weight, dtype = problem.hidden_UH, problem.weight_VlH, problem.compute_dtype
    rows, width = hidden.shape
    assert kernels.invariant_rows is not None
    height, pad = kernels.invariant_rows, -width % PAD_HIDDEN
    columns = min(INVARIANT_COLUMNS, len(weight) + -len(weight) % PAD_COLUMNS)
    size = height * columns * torch.finfo(dtype).bits // 8
    if size > problem.max_buffer_bytes:
        raise ValueError(f"batch_invariant needs max_buffer_bytes of {size} at least, got {problem.max_buffer_bytes}")
    hidden_RH = hidden.new_zeros(height, width + pad, dtype=dtype)
    buffer_RC = hidden.new_empty(height, columns, dtype=dtype)
    for c0 in range(0, len(weight), columns):
        weight_CH = problem.operand(weight[c0 : c0 + columns])
        count = len(weight_CH)
        weight_CH = F.pad(weight_CH, (0, pad, 0, columns - count))
        for r0 in range(0, rows, height):
            r1 = min(r0 + height, rows)
            hidden_RH[: r1 - r0, :width] = hidden[r0:r1]
            problem.gemm(hidden_RH, weight_CH.T, buffer_RC)
            logits = buffer_RC[: r1 - r0, :count]
            row_pass(logits, r0, c0)
            if kept is not None:
                kept[r0:r1, c0 : c0 + count] = logits


def backward(
    problem: Problem,
    kernels: RowKernels,
    stats_K4: Tensor,
    grad_K4: Tensor,
    kept: Tensor,
    need_hidden: bool,
    need_weight: bool,
    hidden_done: HiddenDone,
) -> Tensor:
    """Gradient of weight_VlH (empty when not needed); that of hidden_UH goes to `hidden_done`, called once if needed.

    Both are accumulated in the compute dtype and given in the operands' dtype. Without kept logits each block is
    computed again. `hidden_done` is called before the last GEMM of the weight gradient: a reduction can run beside it.
    """
    vocab, all_rows = problem.weight_VlH.shape[0], problem.hidden_UH.shape[0]
    recompute = kept.numel() == 0
    problem, stats_K4, grad_K4, rows_A = drop_zero_rows(problem, stats_K4, grad_K4)
    hidden, weight, dtype = problem.hidden_UH, problem.weight_VlH, problem.compute_dtype
    rows, in_place = hidden.shape[0], weight.dtype == dtype
    blocks = problem.blocks(False, backward=True) if recompute else Blocks(rows, min(vocab, SCRATCH_COLUMNS), False)
    columns = problem.columns(blocks)
    size = blocks.rows * columns if rows and vocab else 0
    direct = bool(size) and not recompute and problem.half_gemm
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=hidden.dtype if direct else dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,))

    def finish_hidden() -> None:
        done = grad_hidden.to(hidden.dtype)
        hidden_done(done if rows_A is None else done.new_zeros(all_rows, done.shape[1]).index_copy_(0, rows_A, done))

    if need_hidden and not size:
        finish_hidden()
    if direct:
        hidden_out, weight_out = grad_hidden if need_hidden else None, grad_weight if need_weight else None
        _kept_products(problem, kernels, stats_K4, grad_K4, kept, rows_A, hidden_out, weight_out, finish_hidden)
        return grad_weight
    logits_buffer = hidden.new_empty(size if recompute else 0, dtype=dtype)
    half_buffer = hidden.new_empty(size if problem.half_gemm else 0)
    scratch = half_buffer if problem.half_gemm else hidden.new_empty(0 if recompute else size, dtype=dtype)
    for c0 in range(0, vocab if rows else 0, columns):
        weight_CH = problem.operand(weight[c0 : c0 + columns])
        c1 = c0 + len(weight_CH)
        grad_CH = None
        if need_weight:
            grad_CH = grad_weight[c0:c1] if in_place else torch.empty_like(weight_CH, dtype=dtype)
        for r0 in range(0, rows, blocks.rows):
            r1 = min(r0 + blocks.rows, rows)
            shape, count = (r1 - r0, c1 - c0), (r1 - r0) * (c1 - c0)
            hidden_RH = problem.operand(hidden[r0:r1])
            if recompute:
                logits = logits_buffer[:count].view(shape)
                problem.gemm(hidden_RH, weight_CH.T, logits)
            else:
                logits = kept[:, c0:c1]
            dlogits = logits if recompute and not problem.half_gemm else scratch[:count].view(shape)
            kernels.backward(
                logits,
                None if recompute else rows_A,
                dlogits,
                problem.vocab_start + c0,
                problem.target_K,
                problem.row_start_U1[r0 : r1 + 1],
                stats_K4,
                grad_K4,
                problem.inv_temperature,
                problem.softcap,
            )
            if need_hidden:
                problem.gemm_add(grad_hidden[r0:r1], dlogits, weight_CH)
                if c1 == vocab and r1 == rows:
                    finish_hidden()
            if grad_CH is not None and r0 == 0:
                problem.gemm(dlogits.T, hidden_RH, grad_CH)
            elif grad_CH is not None:
                problem.gemm_add(grad_CH, dlogits.T, hidden_RH)
        if grad_CH is not None and not in_place:
            grad_weight[c0:c1] = grad_CH
    return grad_weight


def _kept_products(
    problem: Problem,
    kernels: RowKernels,
    stats_K4: Tensor,
    grad_K4: Tensor,
    kept: Tensor,
    rows_A: Tensor | None,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    finish_hidden: Callable[[], None],
) -> None:
    """Both gradients from kept logits and bf16 operands, each element by one GEMM, which sums in fp32.

    First all of the gradient of hidden, by row blocks; then that of the weight, by vocabulary blocks. The gradient of
    the logits is made twice, a pass over memory; in return no fp32 sums are kept in memory or added to.
    """
    hidden, weight = problem.hidden_UH, problem.weight_VlH
    rows, vocab = len(hidden), len(weight)
    room = (problem.max_buffer_bytes - kept.numel() * kept.element_size()) // hidden.element_size()
    height = max(1, min(rows, KEPT_ROWS, room // vocab))
    columns = max(1, min(vocab, height * vocab // rows))
    buffer = hidden.new_empty(max(height * vocab, rows * columns))

    def dlogits(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        out = buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
        kernels.backward(
            kept[r0:r1, c0:c1] if rows_A is None else kept[:, c0:c1],
            None if rows_A is None else rows_A[r0:r1],
            out,
            problem.vocab_start + c0,
            problem.target_K,
            problem.row_start_U1[r0 : r1 + 1],
            stats_K4,
            grad_K4,
            problem.inv_temperature,
            problem.softcap,
        )
        return out

    if grad_hidden is not None:
        for r0 in range(0, rows, height):
            r1 = min(r0 + height, rows)
            torch.mm(dlogits(r0, r1, 0, vocab), weight, out=grad_hidden[r0:r1])
        finish_hidden()
    if grad_weight is not None:
        for c0 in range(0, vocab, columns):
            c1 = min(c0 + columns, vocab)
            torch.mm(dlogits(0, rows, c0, c1).T, hidden, out=grad_weight[c0:c1])
