"""The forward pass of linear_logprob: vendor GEMMs into a bounded buffer, a row pass after each (`problem`, `buffers`).

Shapes: U rows used, K targets, Vl local vocabulary shard.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_hpc.kernels.linear_logprob.buffers import INVARIANT_COLUMNS, PAD_COLUMNS, PAD_HIDDEN
from tulu_hpc.kernels.linear_logprob.problem import Operand, Problem, RowKernels, per_target

LOWEST = torch.finfo(torch.float32).min


def forward(problem: Problem, kernels: RowKernels, keep: bool, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
    """stats_K4 and the logits kept for the backward pass ([U, Vl], or [0, 0] when they are not kept)."""
    hidden, weight = problem.hidden_UH, problem.weight_VlH
    rows, vocab, dtype = hidden.shape[0], weight.shape[0], problem.compute_dtype
    plan = problem.plan(keep)
    state_3U = hidden.new_zeros(3, rows, dtype=dtype)
    state_3U[0] = LOWEST
    picked_K = hidden.new_full((len(problem.target_K),), -torch.inf, dtype=dtype)
    kept = hidden.new_empty((rows, vocab) if plan.strategy == "kept" else (0, 0), dtype=dtype)

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
        _invariant_products(problem, kernels, kept if plan.strategy == "kept" else None, row_pass)
    elif rows and vocab:
        height, columns = plan.forward.rows, plan.forward.columns
        hidden_piece, weight_piece = Operand(problem, hidden, height), Operand(problem, weight, columns)
        buffer = hidden.new_empty(0 if plan.strategy == "kept" else height * columns, dtype=dtype)
        for c0 in range(0, vocab, columns):
            c1 = min(c0 + columns, vocab)
            for r0 in range(0, rows, height):
                r1 = min(r0 + height, rows)
                if plan.strategy == "kept":
                    logits = kept[r0:r1, c0:c1]
                else:
                    logits = buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
                problem.gemm(hidden_piece(r0, r1), weight_piece(c0, c1).T, logits)
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
    size = height * columns * dtype.itemsize
    if size > problem.max_buffer_bytes:
        raise ValueError(f"batch_invariant needs max_buffer_bytes of {size} at least, got {problem.max_buffer_bytes}")
    hidden_RH = hidden.new_zeros(height, width + pad, dtype=dtype)
    buffer_RC = hidden.new_empty(height, columns, dtype=dtype)
    for c0 in range(0, len(weight), columns):
        weight_CH = weight[c0 : c0 + columns].to(dtype)
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
