"""The forward pass of linear_logprob: vendor GEMMs into a bounded buffer, a row pass after each (`problem`, `buffers`).

Shapes: U rows used, K targets, Vl local vocabulary shard.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tulu_hpc.kernels.linear_logprob.buffers import PAD_COLUMNS, PAD_HIDDEN, Blocks, pads_weight
from tulu_hpc.kernels.linear_logprob.problem import Problem, RowKernels, copy_rows, per_target

LOWEST = torch.finfo(torch.float32).min


def forward(problem: Problem, kernels: RowKernels, keep: bool) -> tuple[Tensor, Tensor]:
    """stats_K4 and the logits kept for the backward pass ([U, Vl], or [0, 0] when they are not kept)."""
    hidden, rows, vocab, dtype = problem.hidden_TH, problem.rows, len(problem.weight_VlH), problem.compute_dtype
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

    if not (rows and vocab):
        pass
    elif problem.invariant_rows:
        _invariant_products(problem, plan.forward, kept if plan.strategy == "kept" else None, row_pass)
    else:
        height, columns = plan.forward.rows, plan.forward.columns
        hidden_piece, weight_piece = problem.hidden(height), problem.weight(columns)
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
    problem: Problem, shape: Blocks, kept: Tensor | None, row_pass: Callable[[Tensor, int, int], None]
) -> None:
    """Logits by GEMMs of fixed shapes, on copies of the operands that are padded with zeros where they must be."""
    hidden, weight, dtype = problem.hidden_TH, problem.weight_VlH, problem.compute_dtype
    vocab, width = weight.shape
    padded = width + -width % PAD_HIDDEN
    hidden_RH = hidden.new_zeros(shape.rows, padded, dtype=dtype)
    copies = weight.dtype != dtype or pads_weight(width, vocab)
    weight_CH = weight.new_zeros(shape.columns, padded, dtype=dtype) if copies else weight
    buffer = hidden.new_empty(shape.rows * shape.columns, dtype=dtype)
    for c0 in range(0, vocab, shape.columns):
        count = min(shape.columns, vocab - c0)
        columns = count + -count % PAD_COLUMNS
        logits_RC = buffer[: shape.rows * columns].view(shape.rows, columns)
        if copies:
            weight_CH[:count, :width] = weight[c0 : c0 + count]
            weight_CH[count:] = 0
        block_CH = weight_CH[:columns] if copies else weight[c0 : c0 + count]
        for r0 in range(0, problem.rows, shape.rows):
            r1 = min(r0 + shape.rows, problem.rows)
            copy_rows(hidden, problem.rows_U, r0, r1, hidden_RH[: r1 - r0, :width])
            problem.gemm(hidden_RH, block_CH.T, logits_RC)
            logits = logits_RC[: r1 - r0, :count]
            row_pass(logits, r0, c0)
            if kept is not None:
                kept[r0:r1, c0 : c0 + count] = logits
