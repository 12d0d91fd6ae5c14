"""The backward pass of linear_logprob, by one of the three strategies of `buffers.Plan`.

Shapes: T rows of hidden, U of them used, A of those with a non-zero upstream gradient, K targets, Vl local vocabulary
shard, C columns of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tulu_hpc.kernels.linear_logprob.buffers import Blocks, Strategy, kept_blocks
from tulu_hpc.kernels.linear_logprob.problem import HiddenGradient, Problem, RowKernels, drop_zero_rows, spread_rows

# (logits, their rows or None for all in order, out, first row, first column): writes the gradient of the logits to out.
RowPass = Callable[[Tensor, Tensor | None, Tensor, int, int], None]


@dataclass(frozen=True)
class _Out:
    """Where the gradient of the rows A goes; `finish` once they are written."""

    gradient: HiddenGradient
    rows_A: Tensor | None

    def rows_AH(self) -> Tensor:
        rows_UH = self.gradient.rows_UH()
        return rows_UH if self.rows_A is None else rows_UH[: len(self.rows_A)]

    def finish(self) -> None:
        if self.rows_A is not None:
            spread_rows(self.gradient.rows_UH(), self.rows_A)
        self.gradient.start()


def backward(
    problem: Problem,
    kernels: RowKernels,
    stats_K4: Tensor,
    grad_K4: Tensor,
    kept: Tensor,
    hidden_gradient: HiddenGradient | None,
    need_weight: bool,
) -> Tensor:
    """Gradient of weight_VlH (empty when not needed); that of the used rows goes to `hidden_gradient`, if there is one.

    Both are summed in the compute dtype and given in the operands' dtype. Without kept logits each block is computed
    again. `hidden_gradient.start` is called before the last GEMM of the weight gradient: a reduction can run beside it.
    """
    weight = problem.weight_VlH
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,))
    problem, stats_K4, grad_K4, rows_A, strategy, blocks = _active_rows(problem, stats_K4, grad_K4, kept.numel() > 0)

    def row_pass(logits: Tensor, rows: Tensor | None, out: Tensor, r0: int, c0: int) -> None:
        kernels.backward(
            logits,
            rows,
            out,
            problem.vocab_start + c0,
            problem.target_K,
            problem.row_start_U1[r0 : r0 + len(out) + 1],
            stats_K4,
            grad_K4,
            problem.inv_temperature,
            problem.softcap,
        )

    hidden_out = None if hidden_gradient is None else _Out(hidden_gradient, rows_A)
    weight_out = grad_weight if need_weight else None
    if not (problem.rows and len(weight)):
        if hidden_out:
            hidden_out.rows_AH().zero_()
            hidden_out.finish()
    elif strategy == "kept" and problem.half_gemm:
        _from_kept_logits(problem, blocks, row_pass, kept, rows_A, weight_out, hidden_out)
    elif strategy == "whole":
        _from_whole_gradient(problem, blocks, row_pass, weight_out, hidden_out)
    else:
        _by_blocks(problem, blocks, row_pass, kept, rows_A, weight_out, hidden_out)
    return grad_weight


def _active_rows(
    problem: Problem, stats_K4: Tensor, grad_K4: Tensor, kept: bool
) -> tuple[Problem, Tensor, Tensor, Tensor | None, Strategy, Blocks]:
    """`drop_zero_rows`, and strategy and blocks for what is left.

    Where a copy of the rows that are left does not fit beside kept logits, all of them stay.
    """
    fewer = drop_zero_rows(problem, stats_K4, grad_K4)
    if not kept or not fewer[0].rows:
        plan = fewer[0].plan(allow_keep=False)
        return *fewer, plan.strategy, plan.backward
    if blocks := kept_blocks(fewer[0].sizes(), problem.rows, problem.max_buffer_bytes):
        return *fewer, "kept", blocks
    return problem, stats_K4, grad_K4, None, "kept", problem.plan(allow_keep=True).backward


def _by_blocks(
    problem: Problem,
    blocks: Blocks,
    row_pass: RowPass,
    kept: Tensor,
    rows_A: Tensor | None,
    grad_weight: Tensor | None,
    out: _Out | None,
) -> None:
    """Block by block, from kept or recomputed logits; the gradient of hidden is summed in the compute dtype."""
    hidden, weight, dtype = problem.hidden_TH, problem.weight_VlH, problem.compute_dtype
    rows, vocab, recompute = problem.rows, len(weight), kept.numel() == 0
    height, columns = blocks.rows, blocks.columns
    one_block_of_rows = height == rows
    hidden_piece, weight_piece = problem.hidden(height), problem.weight(columns)
    if out is None:
        grad_hidden = hidden.new_empty(0)
    elif hidden.dtype == dtype:
        grad_hidden = out.rows_AH().zero_()
    else:
        grad_hidden = hidden.new_zeros(rows, hidden.shape[1], dtype=dtype)
    logits_buffer = hidden.new_empty(height * columns if recompute else 0, dtype=dtype)
    in_place = recompute and not problem.half_gemm
    gradient_dtype = hidden.dtype if problem.half_gemm else dtype
    gradient_buffer = logits_buffer if in_place else hidden.new_empty(height * columns, dtype=gradient_dtype)
    # Written in place where the GEMM can, by one product or in the weight's dtype; else summed beside it and rounded.
    direct = weight.dtype == dtype or (problem.half_gemm and one_block_of_rows)
    sums = weight.new_empty(0 if direct or grad_weight is None else (columns, hidden.shape[1]), dtype=dtype)
    for c0 in range(0, vocab, columns):
        c1 = min(c0 + columns, vocab)
        for r0 in range(0, rows, height):
            r1 = min(r0 + height, rows)
            shape, count = (r1 - r0, c1 - c0), (r1 - r0) * (c1 - c0)
            logits = logits_buffer[:count].view(shape) if recompute else kept[:, c0:c1]
            if recompute:
                problem.gemm(hidden_piece(r0, r1), weight_piece(c0, c1).T, logits)
            dlogits = gradient_buffer[:count].view(shape)
            row_pass(logits, None if recompute else rows_A, dlogits, r0, c0)
            if out:
                problem.gemm_add(grad_hidden[r0:r1], dlogits, weight_piece(c0, c1))
                if c1 == vocab and r1 == rows:
                    if hidden.dtype != dtype:
                        out.rows_AH().copy_(grad_hidden)
                    out.finish()
            if grad_weight is None:
                continue
            grad_CH = grad_weight[c0:c1] if direct else sums[: c1 - c0]
            if r0:
                problem.gemm_add(grad_CH, dlogits.T, hidden_piece(r0, r1))
            elif problem.half_gemm and direct:
                problem.gemm_half(dlogits.T, hidden_piece(r0, r1), grad_CH)
            else:
                problem.gemm(dlogits.T, hidden_piece(r0, r1), grad_CH)
        if grad_weight is not None and not direct:
            grad_weight[c0:c1] = sums[: c1 - c0]


def _from_whole_gradient(
    problem: Problem, blocks: Blocks, row_pass: RowPass, grad_weight: Tensor | None, out: _Out | None
) -> None:
    """bf16 operands: first the gradient of all logits, block by block from recomputed ones; then one GEMM each."""
    weight, rows, vocab = problem.weight_VlH, problem.rows, len(problem.weight_VlH)
    height, columns = blocks.rows, blocks.columns
    hidden = problem.hidden(rows)(0, rows)
    dlogits = hidden.new_empty(rows, vocab)
    buffer = hidden.new_empty(height * columns, dtype=problem.compute_dtype)
    for c0 in range(0, vocab, columns):
        c1 = min(c0 + columns, vocab)
        for r0 in range(0, rows, height):
            r1 = min(r0 + height, rows)
            logits = buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
            problem.gemm(hidden[r0:r1], weight[c0:c1].T, logits)
            row_pass(logits, None, dlogits[r0:r1, c0:c1], r0, c0)
    del buffer, logits
    if out:
        problem.gemm_half(dlogits, weight, out.rows_AH())
        out.finish()
    if grad_weight is not None:
        problem.gemm_half(dlogits.T, hidden, grad_weight)


def _from_kept_logits(
    problem: Problem,
    blocks: Blocks,
    row_pass: RowPass,
    kept: Tensor,
    rows_A: Tensor | None,
    grad_weight: Tensor | None,
    out: _Out | None,
) -> None:
    """Both gradients from kept logits and bf16 operands, each element by one GEMM, which sums in fp32.

    First all of the gradient of hidden, by row blocks; then that of the weight, by vocabulary blocks. The gradient of
    the logits is made twice, a pass over memory; in return no fp32 sums are kept in memory or added to.
    """
    weight, rows, vocab = problem.weight_VlH, problem.rows, len(problem.weight_VlH)
    height, columns = blocks.rows, blocks.columns
    buffer = weight.new_empty(max(height * vocab, rows * columns))

    def dlogits(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        block = buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
        logits = kept[r0:r1, c0:c1] if rows_A is None else kept[:, c0:c1]
        row_pass(logits, None if rows_A is None else rows_A[r0:r1], block, r0, c0)
        return block

    if out:
        grad_hidden = out.rows_AH()
        for r0 in range(0, rows, height):
            r1 = min(r0 + height, rows)
            problem.gemm_half(dlogits(r0, r1, 0, vocab), weight, grad_hidden[r0:r1])
        out.finish()
    if grad_weight is not None:
        hidden = problem.hidden(rows)(0, rows)
        for c0 in range(0, vocab, columns):
            c1 = min(c0 + columns, vocab)
            problem.gemm_half(dlogits(0, rows, c0, c1).T, hidden, grad_weight[c0:c1])
