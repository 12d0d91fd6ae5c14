"""The torch.library ops under linear_logprob: statistics of one shard and their backward pass, with the collectives.

Shapes: T rows of hidden (of this rank's slice under sequence parallelism), U rows that have targets, K targets,
H hidden, Vl local vocabulary shard.

The collectives on hidden are inside the ops, by name of the process group ("": none), so that the reduction of its
gradient runs while the gradient of the weight is computed.

`linear_logprob_stats` gives the statistics [K, 4] of the local shard; with `keep` and room for them, the logits; the
gathered rows [U, H]. Targets are in row order: those of row u, which is row rows_U[u] of hidden (None: row u), are
row_start[u]:row_start[u + 1]. The logits and, without sequence parallelism, the gathered rows are empty tensors.

`linear_logprob_stats_backward` gives the gradients of hidden, summed over the group, and of the weight; one that is not
needed is empty. The reduction of the gradient of hidden starts before the last GEMM of the weight's gradient and ends
after it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels.linear_logprob import blocks, buffers, gradients, onednn, tensor_parallel
from tulu_hpc.kernels.linear_logprob.cpu import CpuRows
from tulu_hpc.kernels.linear_logprob.cuda import CudaRows
from tulu_hpc.kernels.linear_logprob.problem import Problem, RowKernels
from tulu_hpc.kernels.linear_logprob.reference import ReferenceRows
from tulu_hpc.kernels.registry import record

OP = "linear_logprob"
ROWS: dict[str, RowKernels] = {"reference": ReferenceRows(), "cpu": CpuRows(), "cuda": CudaRows()}

# The arguments that both ops have, as fields of `_Operands` and `_Settings`.
_OPERANDS = "Tensor hidden_TH, Tensor weight_VlH, Tensor target_K, Tensor row_start_U1, Tensor? rows_U"
_SETTINGS = (
    "float inv_temperature, float softcap, int vocab_start, int max_buffer_bytes, "
    "str backend, str group, bool sequence_parallel"
)
FORWARD_SCHEMA = f"({_OPERANDS}, {_SETTINGS}, bool keep, bool batch_invariant) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_K4, Tensor stats_K4, Tensor logits, Tensor gathered, {_OPERANDS}, {_SETTINGS}, "
    "bool need_hidden, bool need_weight) -> (Tensor, Tensor)"
)


class _Operands(NamedTuple):
    hidden_TH: Tensor
    weight_VlH: Tensor
    target_K: Tensor
    row_start_U1: Tensor
    rows_U: Tensor | None


class _Settings(NamedTuple):
    inv_temperature: float
    softcap: float
    vocab_start: int
    max_buffer_bytes: int
    backend: str
    group: str
    sequence_parallel: bool

    @property
    def gathers(self) -> bool:
        return bool(self.group) and self.sequence_parallel

    def problem(self, operands: _Operands, gathered_UH: Tensor, batch_invariant: bool = False) -> Problem:
        """gathered_UH: the used rows where hidden is gathered over ranks."""
        kernels = ROWS.get(self.backend)
        return Problem(
            gathered_UH if self.gathers else operands.hidden_TH,
            operands.weight_VlH,
            operands.target_K,
            operands.row_start_U1,
            self.inv_temperature,
            self.softcap,
            self.vocab_start,
            self.max_buffer_bytes,
            onednn=self.backend == "cpu" and onednn.available(),
            rows_U=None if self.gathers else operands.rows_U,
            invariant_rows=(kernels.invariant_rows or 0) if kernels and batch_invariant else 0,
        )


_COUNTS = len(_Operands._fields), len(_Settings._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[_Operands, _Settings, tuple[Any, ...]]:
    """(operands, settings, the rest) of the arguments of an op from hidden_TH on."""
    operands, settings = _COUNTS
    end = operands + settings
    return _Operands(*arguments[:operands]), _Settings(*arguments[operands:end]), arguments[end:]


def _stats(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, settings, (keep, batch_invariant) = _split(arguments)
    record(OP, settings.backend)
    hidden_TH = operands.hidden_TH
    gathered = hidden_TH.new_empty(0, 0)
    if settings.gathers:
        gathered = tensor_parallel.gather_rows(hidden_TH, settings.group)
        if operands.rows_U is not None:
            gathered = gathered.index_select(0, operands.rows_U)
    problem = settings.problem(operands, gathered, batch_invariant)
    if settings.backend == "triton":
        from tulu_hpc.kernels.linear_logprob import triton_kernels

        with torch.cuda.device_of(hidden_TH):  # Triton launches on the current device
            stats = triton_kernels.forward(problem)
        return stats, hidden_TH.new_empty(0, 0, dtype=torch.float32), gathered
    stats, logits = blocks.forward(problem, ROWS[settings.backend], keep)
    return stats, logits, gathered


def _stats_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, settings, (keep, batch_invariant) = _split(arguments)
    hidden_TH, rows = operands.hidden_TH, operands.row_start_U1.shape[0] - 1
    gathered = hidden_TH.new_empty((rows, hidden_TH.shape[1]) if settings.gathers else (0, 0))
    problem = settings.problem(operands, gathered, batch_invariant)
    dtype, shape = problem.compute_dtype, (0, 0)
    may_keep = keep and settings.backend != "triton"
    if may_keep and buffers.keeps_logits(problem.sizes(), settings.max_buffer_bytes):
        shape = (rows, operands.weight_VlH.shape[0])
    return (
        hidden_TH.new_empty(len(operands.target_K), 4, dtype=dtype),
        hidden_TH.new_empty(shape, dtype=dtype),
        gathered,
    )


def _stats_backward(
    grad_K4: Tensor, stats_K4: Tensor, logits: Tensor, gathered: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    operands, settings, (need_hidden, need_weight) = _split(arguments)
    record(OP, settings.backend)
    hidden_TH = operands.hidden_TH
    problem = settings.problem(operands, gathered)
    reduction = tensor_parallel.HiddenReduction(hidden_TH, operands.rows_U, settings.group, settings.gathers)
    hidden_gradient = reduction if need_hidden else None
    grad_K4 = grad_K4.contiguous()
    if settings.backend == "triton":
        from tulu_hpc.kernels.linear_logprob import triton_kernels

        with torch.cuda.device_of(hidden_TH):
            grad_weight = triton_kernels.backward(problem, stats_K4, grad_K4, hidden_gradient, need_weight)
    else:
        kernels = ROWS[settings.backend]
        grad_weight = gradients.backward(problem, kernels, stats_K4, grad_K4, logits, hidden_gradient, need_weight)
    return reduction.wait() if need_hidden else hidden_TH.new_empty(0), grad_weight


def _stats_backward_fake(
    grad_K4: Tensor, stats_K4: Tensor, logits: Tensor, gathered: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    (hidden, weight, *_), _, (need_hidden, need_weight) = _split(arguments)
    return hidden.new_empty(hidden.shape if need_hidden else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    operands, ctx.settings, _ = _split(inputs)
    stats, logits, gathered = output
    ctx.set_materialize_grads(False)  # else autograd would make a [U, Vl] tensor of zeros for the kept logits
    ctx.mark_non_differentiable(logits, gathered)
    # Under sequence parallelism of hidden only the shape is used again.
    ctx.save_for_backward(stats, logits, gathered, *operands)


def _backward(ctx: Any, grad_stats: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (sum(_COUNTS) + 2)
    if grad_stats is None:
        return nothing
    need = ctx.needs_input_grad[:2]
    grads = torch.ops.tulu_hpc.linear_logprob_stats_backward(grad_stats, *ctx.saved_tensors, *ctx.settings, *need)
    return tuple(grad if needed else None for grad, needed in zip(grads, need)) + nothing[2:]


linear_logprob_stats = torch.library.custom_op(
    "tulu_hpc::linear_logprob_stats", _stats, mutates_args=(), schema=FORWARD_SCHEMA
)
linear_logprob_stats.register_fake(_stats_fake)
linear_logprob_stats.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_stats_backward = torch.library.custom_op(
    "tulu_hpc::linear_logprob_stats_backward", _stats_backward, mutates_args=(), schema=BACKWARD_SCHEMA
)
linear_logprob_stats_backward.register_fake(_stats_backward_fake)
