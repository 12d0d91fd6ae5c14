"""The torch.library ops under linear_logprob: statistics of one shard and their backward pass, with the collectives.

Shapes: T rows of hidden (of this rank's slice under sequence parallelism), U rows that have targets, K targets,
H hidden, Vl local vocabulary shard.

The collectives on hidden are inside the ops, by name of the process group ("": none), so that the reduction of its
gradient runs while the gradient of the weight is computed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels.linear_logprob import blocks, onednn, tensor_parallel
from tulu_hpc.kernels.linear_logprob.cpu import CpuRows
from tulu_hpc.kernels.linear_logprob.cuda import CudaRows
from tulu_hpc.kernels.linear_logprob.reference import ReferenceRows
from tulu_hpc.kernels.registry import record

OP = "linear_logprob"
ROWS: dict[str, blocks.RowKernels] = {"reference": ReferenceRows(), "cpu": CpuRows(), "cuda": CudaRows()}


@torch.library.custom_op("tulu_hpc::linear_logprob_stats", mutates_args=())
def linear_logprob_stats(
    hidden_TH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    rows_U: Tensor | None,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    keep: bool,
    batch_invariant: bool,
    backend: str,
    group: str,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [K, 4] of the local shard; with `keep` and room for them, the logits; the gathered rows [U, H].

    Targets are in row order: those of row u, which is row rows_U[u] of hidden (None: row u), are
    row_start[u]:row_start[u + 1]. The logits and, without sequence parallelism, the gathered rows are empty tensors.
    """
    record(OP, backend)
    gathered = hidden_TH.new_empty(0, 0)
    if group and sequence_parallel:
        hidden_TH = tensor_parallel.gather_rows(hidden_TH, group)
    hidden_UH = hidden_TH if rows_U is None else hidden_TH.index_select(0, rows_U)
    if group and sequence_parallel:
        gathered = hidden_UH
    problem = blocks.Problem(
        hidden_UH,
        weight_VlH,
        target_K,
        row_start_U1,
        inv_temperature,
        softcap,
        vocab_start,
        max_buffer_bytes,
        onednn=backend == "cpu" and onednn.available(),
    )
    if backend == "triton":
        from tulu_hpc.kernels.linear_logprob import triton_kernels

        return triton_kernels.forward(problem), hidden_UH.new_empty(0, 0, dtype=torch.float32), gathered
    stats, logits = blocks.forward(problem, ROWS[backend], keep, batch_invariant)
    return stats, logits, gathered


@linear_logprob_stats.register_fake
def _stats_fake(
    hidden_TH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    rows_U: Tensor | None,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    keep: bool,
    batch_invariant: bool,
    backend: str,
    group: str,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = row_start_U1.shape[0] - 1, torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    shape = (0, 0)
    if backend != "triton":
        used = hidden_TH.new_empty(rows, hidden_TH.shape[1])
        problem = blocks.Problem(
            used, weight_VlH, target_K, row_start_U1, inv_temperature, softcap, vocab_start, max_buffer_bytes
        )
        if problem.blocks(allow_keep=keep, backward=False).keep:
            shape = (rows, weight_VlH.shape[0])
    gathered = (rows, hidden_TH.shape[1]) if group and sequence_parallel else (0, 0)
    return (
        hidden_TH.new_empty(len(target_K), 4, dtype=dtype),
        hidden_TH.new_empty(shape, dtype=dtype),
        hidden_TH.new_empty(gathered),
    )


@torch.library.custom_op("tulu_hpc::linear_logprob_stats_backward", mutates_args=())
def linear_logprob_stats_backward(
    grad_K4: Tensor,
    stats_K4: Tensor,
    logits: Tensor,
    gathered: Tensor,
    hidden_TH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    rows_U: Tensor | None,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
    group: str,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden, summed over the group, and of the weight; one that is not needed is empty.

    The reduction of the gradient of hidden starts before the last GEMM of the weight's gradient and ends after it.
    """
    record(OP, backend)
    scattered = bool(group) and sequence_parallel
    if scattered:
        hidden_UH = gathered
    else:
        hidden_UH = hidden_TH if rows_U is None else hidden_TH.index_select(0, rows_U)
    problem = blocks.Problem(
        hidden_UH,
        weight_VlH,
        target_K,
        row_start_U1,
        inv_temperature,
        softcap,
        vocab_start,
        max_buffer_bytes,
        onednn=backend == "cpu" and onednn.available(),
    )
    reduction = tensor_parallel.HiddenReduction(hidden_TH, rows_U, group, scattered)
    grad_K4 = grad_K4.contiguous()
    if backend == "triton":
        from tulu_hpc.kernels.linear_logprob import triton_kernels

        grad_weight = triton_kernels.backward(problem, stats_K4, grad_K4, need_hidden, need_weight, reduction.start)
    else:
        grad_weight = blocks.backward(
            problem, ROWS[backend], stats_K4, grad_K4, logits, need_hidden, need_weight, reduction.start
        )
    return reduction.wait() if need_hidden else hidden_TH.new_empty(0), grad_weight


@linear_logprob_stats_backward.register_fake
def _backward_fake(
    grad_K4: Tensor,
    stats_K4: Tensor,
    logits: Tensor,
    gathered: Tensor,
    hidden_TH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    rows_U: Tensor | None,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
    group: str,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    hidden = hidden_TH.new_empty(hidden_TH.shape if need_hidden else (0,))
    return hidden, weight_VlH.new_empty(weight_VlH.shape if need_weight else (0,))


class _Constants(NamedTuple):
    inv_temperature: float
    softcap: float
    vocab_start: int
    max_buffer_bytes: int


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    stats, logits, gathered = output
    ctx.set_materialize_grads(False)  # else autograd would make a [U, Vl] tensor of zeros for the kept logits
    ctx.mark_non_differentiable(logits, gathered)
    # Under sequence parallelism of hidden only the shape is used again.
    ctx.save_for_backward(*inputs[:5], stats, logits, gathered)
    ctx.constants = _Constants(*inputs[5:9])
    ctx.where = inputs[11:]


def _backward(ctx: Any, grad_stats: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_stats is None:
        return (None,) * 14
    hidden, weight, target, row_start, rows, stats, logits, gathered = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    grad_hidden, grad_weight = torch.ops.tulu_hpc.linear_logprob_stats_backward(
        grad_stats,
        stats,
        logits,
        gathered,
        hidden,
        weight,
        target,
        row_start,
        rows,
        *ctx.constants,
        need_hidden,
        need_weight,
        *ctx.where,
    )
    return (grad_hidden if need_hidden else None, grad_weight if need_weight else None) + (None,) * 12


linear_logprob_stats.register_autograd(_backward, setup_context=_setup_context)
