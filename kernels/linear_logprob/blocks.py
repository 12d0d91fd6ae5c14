"""The block loop of linear_logprob: vendor GEMMs into a bounded buffer, one row pass between them.

Shapes: U rows used, K targets (sorted by row), H hidden, Vl local vocabulary shard, C columns of a block.

Statistics of target k, `stats_K4[k]`, over the local shard of its row (x = transformed logits):
    0 maximum            m = max_j x_j                     (a constant for the gradient)
    1 log of the sum     log sum_j exp(x_j - m)
    2 centred mean       sum_j softmax(x)_j (x_j - m)
    3 picked             x_target, or -inf when the target is not in this shard
They are all that tensor-parallel ranks have to exchange. With g1, g2, g3 the upstream gradients of 1, 2, 3 summed over
the targets of a row:  dx_j = p_j (g1 + g2 (1 - centred) + g2 (x_j - m)) + [j = target] g3.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Columns below which a GEMM block is inefficient: rows are blocked too rather than going under it.
MIN_COLUMNS = 1024
# Scratch columns of the backward pass over kept logits.
SCRATCH_COLUMNS = 4096
LOWEST = torch.finfo(torch.float32).min


class RowKernels(Protocol):
    """The row passes of one backend."""

    name: str

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
        out_UC: Tensor,
        first: int,
        target_K: Tensor,
        row_start_U1: Tensor,
        stats_K4: Tensor,
        grad_K4: Tensor,
        inv_temperature: float,
        softcap: float,
    ) -> None:
        """Writes the gradient of the block's logits to `out_UC`, which may be `logits_UC` itself when dtypes agree.

        A row without targets gets zeros.
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

    def operand(self, x: Tensor) -> Tensor:
        return x if self.half_gemm else x.to(self.compute_dtype)

    def gemm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a @ b in the compute dtype."""
        if self.half_gemm:
            torch.mm(a, b, out_dtype=self.compute_dtype, out=out)
        else:
            torch.mm(a, b, out=out)

    def gemm_add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b in the compute dtype."""
        if self.half_gemm:
            torch.addmm(total, a, b, out_dtype=self.compute_dtype, out=total)
        else:
            total.addmm_(a, b)


def forward(problem: Problem, kernels: RowKernels, keep: bool) -> tuple[Tensor, Tensor]:
    """stats_K4 and the logits kept for the backward pass ([U, Vl], or [0, 0] when they are not kept)."""
    hidden, weight = problem.hidden_UH, problem.weight_VlH
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], problem.compute_dtype
    blocks = problem.blocks(allow_keep=keep, backward=False)
    state_3U = hidden.new_zeros(3, rows, dtype=dtype)
    state_3U[0] = LOWEST
    picked_K = hidden.new_full((len(problem.target_K),), -torch.inf, dtype=dtype)
    buffer = hidden.new_empty(blocks.rows * blocks.columns if rows and vocab else 0, dtype=dtype)
    for c0 in range(0, vocab, blocks.columns):
        weight_CH = problem.operand(weight[c0 : c0 + blocks.columns])
        for r0 in range(0, rows, blocks.rows):
            r1 = min(r0 + blocks.rows, rows)
            logits = buffer[: (r1 - r0) * len(weight_CH)].view(r1 - r0, len(weight_CH))
            problem.gemm(problem.operand(hidden[r0:r1]), weight_CH.T, logits)
            kernels.forward(
                logits,
                problem.vocab_start + c0,
                problem.target_K,
                problem.row_start_U1[r0 : r1 + 1],
                state_3U[:, r0:r1],
                picked_K,
                problem.inv_temperature,
                problem.softcap,
            )
    kept = buffer.view(rows, vocab) if blocks.keep else buffer.new_empty(0, 0)
    maximum, total, dot = state_3U
    # An empty shard has sum 0: log 1 and mean 0 beside the lowest maximum make it vanish in the merge.
    total = total.where(total != 0, 1)
    per_row = torch.stack((maximum, total.log(), dot / total), 1)
    counts = problem.row_start_U1.diff()
    per_target = torch.repeat_interleave(per_row, counts, 0, output_size=len(problem.target_K))
    return torch.cat((per_target, picked_K[:, None]), 1), kept


def backward(
    problem: Problem,
    kernels: RowKernels,
    stats_K4: Tensor,
    grad_K4: Tensor,
    kept: Tensor,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden_UH and weight_VlH (accumulated in the compute dtype, returned in the operands' dtypes).

    One that is not needed comes back empty. Without kept logits each block is computed again.
    """
    hidden, weight, dtype = problem.hidden_UH, problem.weight_VlH, problem.compute_dtype
    rows, vocab, in_place = hidden.shape[0], weight.shape[0], weight.dtype == dtype
    recompute = kept.numel() == 0
    if recompute:
        blocks = problem.blocks(allow_keep=False, backward=True)
    else:
        blocks = Blocks(rows, min(vocab, SCRATCH_COLUMNS), False)
    size = blocks.rows * blocks.columns if rows and vocab else 0
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,))
    logits_buffer = hidden.new_empty(size if recompute else 0, dtype=dtype)
    half_buffer = hidden.new_empty(size if problem.half_gemm else 0)
    scratch = half_buffer if problem.half_gemm else hidden.new_empty(0 if recompute else size, dtype=dtype)
    for c0 in range(0, vocab, blocks.columns):
        weight_CH = problem.operand(weight[c0 : c0 + blocks.columns])
        columns = len(weight_CH)
        grad_CH = None
        if need_weight and rows:
            grad_CH = grad_weight[c0 : c0 + columns] if in_place else torch.empty_like(weight_CH, dtype=dtype)
        for r0 in range(0, rows, blocks.rows):
            r1 = min(r0 + blocks.rows, rows)
            shape, count = (r1 - r0, columns), (r1 - r0) * columns
            hidden_RH = problem.operand(hidden[r0:r1])
            if recompute:
                logits = logits_buffer[:count].view(shape)
                problem.gemm(hidden_RH, weight_CH.T, logits)
            else:
                logits = kept[r0:r1, c0 : c0 + columns]
            dlogits = logits if recompute and not problem.half_gemm else scratch[:count].view(shape)
            kernels.backward(
                logits,
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
            if grad_CH is not None and r0 == 0:
                problem.gemm(dlogits.T, hidden_RH, grad_CH)
            elif grad_CH is not None:
                problem.gemm_add(grad_CH, dlogits.T, hidden_RH)
        if grad_CH is not None and not in_place:
            grad_weight[c0 : c0 + columns] = grad_CH
    return grad_hidden.to(hidden.dtype), grad_weight
