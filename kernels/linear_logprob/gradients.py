"""The backward pass of linear_logprob, by one of the three strategies of `buffers.Plan`.

Shapes: U rows used, A of them with a non-zero upstream gradient, K targets, Vl local vocabulary shard, C columns of a
block.
"""

from collections.abc import Callable

from torch import Tensor

from tulu_hpc.kernels.linear_logprob.buffers import Plan
from tulu_hpc.kernels.linear_logprob.problem import HiddenDone, Operand, Problem, RowKernels, drop_zero_rows

# (logits, their rows or None for all in order, out, first row, first column): writes the gradient of the logits to out.
RowPass = Callable[[Tensor, Tensor | None, Tensor, int, int], None]
Finish = Callable[[Tensor], None]


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

    Both are summed in the compute dtype and given in the operands' dtype. Without kept logits each block is computed
    again. `hidden_done` is called before the last GEMM of the weight gradient: a reduction can run beside it.
    """
    all_rows, recompute = problem.hidden_UH.shape[0], kept.numel() == 0
    # The plan of the rows that the forward pass had: fewer rows can only need less.
    plan = None if recompute else problem.plan(allow_keep=True)
    problem, stats_K4, grad_K4, rows_A = drop_zero_rows(problem, stats_K4, grad_K4)
    hidden, weight = problem.hidden_UH, problem.weight_VlH
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,))

    def finish(grad_AH: Tensor) -> None:
        done = grad_AH.to(hidden.dtype)
        hidden_done(done if rows_A is None else done.new_zeros(all_rows, done.shape[1]).index_copy_(0, rows_A, done))

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

    if not (len(hidden) and len(weight)):
        if need_hidden:
            finish(hidden.new_zeros(hidden.shape))
        return grad_weight
    finish_hidden, weight_out = finish if need_hidden else None, grad_weight if need_weight else None
    plan = plan or problem.plan(allow_keep=False)
    if plan.strategy == "kept" and problem.half_gemm:
        _from_kept_logits(problem, plan, row_pass, kept, rows_A, weight_out, finish_hidden)
    elif plan.strategy == "whole":
        _from_whole_gradient(problem, plan, row_pass, weight_out, finish_hidden)
    else:
        _by_blocks(problem, plan, row_pass, kept, rows_A, weight_out, finish_hidden)
    return grad_weight


def _by_blocks(
    problem: Problem,
    plan: Plan,
    row_pass: RowPass,
    kept: Tensor,
    rows_A: Tensor | None,
    grad_weight: Tensor | None,
    finish: Finish | None,
) -> None:
    """Block by block, from kept or recomputed logits; the gradient of hidden is summed in the compute dtype."""
    hidden, weight, dtype = problem.hidden_UH, problem.weight_VlH, problem.compute_dtype
    rows, vocab, recompute = len(hidden), len(weight), kept.numel() == 0
    height, columns = min(plan.backward.rows, rows), plan.backward.columns
    one_block_of_rows = height == rows
    hidden_piece, weight_piece = Operand(problem, hidden, height), Operand(problem, weight, columns)
    grad_hidden = hidden.new_zeros(hidden.shape if finish else (0,), dtype=dtype)
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
            if finish:
                problem.gemm_add(grad_hidden[r0:r1], dlogits, weight_piece(c0, c1))
                if c1 == vocab and r1 == rows:
                    finish(grad_hidden)
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
    problem: Problem, plan: Plan, row_pass: RowPass, grad_weight: Tensor | None, finish: Finish | None
) -> None:
    """bf16 operands: first the gradient of all logits, block by block from recomputed ones; then one GEMM each."""
    hidden, weight = problem.hidden_UH, problem.weight_VlH
    rows, vocab = len(hidden), len(weight)
    height, columns = plan.backward.rows, plan.backward.columns
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
    if finish:
        grad_hidden = hidden.new_empty(hidden.shape)
        problem.gemm_half(dlogits, weight, grad_hidden)
        finish(grad_hidden)
    if grad_weight is not None:
        problem.gemm_half(dlogits.T, hidden, grad_weight)


def _from_kept_logits(
    problem: Problem,
    plan: Plan,
    row_pass: RowPass,
    kept: Tensor,
    rows_A: Tensor | None,
    grad_weight: Tensor | None,
    finish: Finish | None,
) -> None:
    """Both gradients from kept logits and bf16 operands, each element by one GEMM, which sums in fp32.

    First all of the gradient of hidden, by row blocks; then that of the weight, by vocabulary blocks. The gradient of
    the logits is made twice, a pass over memory; in return no fp32 sums are kept in memory or added to.
    """
    hidden, weight = problem.hidden_UH, problem.weight_VlH
    rows, vocab = len(hidden), len(weight)
    height = min(plan.backward.rows, rows)
    columns = max(1, min(vocab, height * vocab // rows))
    buffer = hidden.new_empty(max(height * vocab, rows * columns))

    def dlogits(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        out = buffer[: (r1 - r0) * (c1 - c0)].view(r1 - r0, c1 - c0)
        logits = kept[r0:r1, c0:c1] if rows_A is None else kept[:, c0:c1]
        row_pass(logits, None if rows_A is None else rows_A[r0:r1], out, r0, c0)
        return out

    if finish:
        grad_hidden = hidden.new_empty(hidden.shape)
        for r0 in range(0, rows, height):
            r1 = min(r0 + height, rows)
            problem.gemm_half(dlogits(r0, r1, 0, vocab), weight, grad_hidden[r0:r1])
        finish(grad_hidden)
    if grad_weight is not None:
        for c0 in range(0, vocab, columns):
            c1 = min(c0 + columns, vocab)
            problem.gemm_half(dlogits(0, rows, c0, c1).T, hidden, grad_weight[c0:c1])
