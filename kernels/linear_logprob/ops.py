"""linear_logprob: the public function and the torch.library op under it.

Shapes: T rows of hidden, U rows that have targets, K targets, H hidden, V vocabulary, Vl its local shard.

The op `tulu_hpc::linear_logprob_stats` works on one shard and returns per-target statistics (`blocks`); selection of
rows, collectives and the merge are plain torch around it, so that autograd sees each of them.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.kernels.linear_logprob import blocks, tensor_parallel
from tulu_hpc.kernels.linear_logprob.cpu import CpuRows
from tulu_hpc.kernels.linear_logprob.cuda import CudaRows
from tulu_hpc.kernels.linear_logprob.reference import ReferenceRows
from tulu_hpc.kernels.native import core_status, cuda_status
from tulu_hpc.kernels.registry import USABLE, BackendError, choose, record, register

OP = "linear_logprob"
DEFAULT_BUFFER_BYTES = 256 * 2**20
_ROWS: dict[str, blocks.RowKernels] = {"reference": ReferenceRows(), "cpu": CpuRows(), "cuda": CudaRows()}
register(OP, {"reference": lambda: USABLE, "cpu": core_status, "cuda": cuda_status})


class LogprobOutput(NamedTuple):
    """`logprobs_K` and `entropy_K` (None unless asked for): fp32 (fp64 for fp64 operands), 0.0 for ignored targets."""

    logprobs_K: Tensor
    entropy_K: Tensor | None


def linear_logprob(
    hidden_TH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    *,
    row_K: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    return_entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_start: int | None = None,
    max_buffer_bytes: int | None = None,
    backend: str | None = None,
) -> LogprobOutput:
    """Log-probs, and entropies on request, of `target_K` under softmax(softcap(hidden weight^T) / temperature).

    Differentiable in hidden and weight for any upstream gradient of both outputs. The logits exist only in blocks of at
    most `max_buffer_bytes`; they are kept for the backward pass when all of them fit (6 N H V FLOPs in all), else each
    block is computed again (8 N H V). Only rows with a target that is not ignored enter the GEMMs, each once.
    bf16 operands give fp32 results from fp32 logits; gradients of the weight are accumulated in fp32.

    Args:
        hidden_TH: [T, H], or with `sequence_parallel` this rank's [T / ranks, H] slice of the rows.
        weight_VlH: [Vl, H]: this rank's rows of the LM head, vocabulary padding cut off; Vl may differ between ranks.
        target_K: int64 [K] ids in the whole vocabulary, or `ignore_index`.
        row_K: int64 [K] row of hidden (of the gathered hidden) that predicts each target; several targets may share a
            row. None: target k belongs to row k.
        temperature: > 0, divides the logits after the soft cap.
        softcap: logits become softcap * tanh(logits / softcap); None for none.
        tp_group: the ranks that share the vocabulary. The op gathers hidden rows (`sequence_parallel`) and reduces the
            gradient of hidden itself; statistics are merged by one all-gather of four numbers per target.
        vocab_start: id of this shard's first row; default rank * Vl.
        max_buffer_bytes: bound on memory for logits, default 256 MiB.
        backend: "reference", "cpu" or "cuda"; None chooses by device.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or values.
        BackendError: the backend cannot run here.
    """
    _check(hidden_TH, weight_VlH, target_K, row_K, temperature, softcap, max_buffer_bytes)
    ranks = tp_group.size() if tp_group is not None else 1
    name = _choose(backend, hidden_TH)
    if tp_group is not None and sequence_parallel and ranks > 1:
        hidden_TH = tensor_parallel.GatherRows.apply(hidden_TH, tp_group)
    if vocab_start is None:
        vocab_start = tp_group.rank() * weight_VlH.shape[0] if tp_group is not None else 0
    selection = _select_rows(hidden_TH.shape[0], target_K, row_K, ignore_index)
    hidden_UH = hidden_TH if selection.rows_U is None else hidden_TH.index_select(0, selection.rows_U)
    if tp_group is not None and ranks > 1 and not sequence_parallel:
        hidden_UH = tensor_parallel.CopyToRanks.apply(hidden_UH, tp_group)
    keep = torch.is_grad_enabled() and (hidden_UH.requires_grad or weight_VlH.requires_grad)
    stats_K4, _ = torch.ops.tulu_hpc.linear_logprob_stats(
        hidden_UH.contiguous(),
        weight_VlH.contiguous(),
        selection.target_K,
        selection.row_start_U1,
        1.0 / temperature,
        softcap or 0.0,
        vocab_start,
        DEFAULT_BUFFER_BYTES if max_buffer_bytes is None else max_buffer_bytes,
        keep,
        name,
    )
    if tp_group is not None and ranks > 1:
        stats_RK4 = tensor_parallel.GatherStatistics.apply(stats_K4, tp_group)
    else:
        stats_RK4 = stats_K4[None]
    _check_targets(stats_RK4, selection, ignore_index)
    logprobs, entropy = tensor_parallel.merge(stats_RK4, return_entropy)
    return LogprobOutput(
        selection.restore(logprobs, len(target_K)),
        None if entropy is None else selection.restore(entropy, len(target_K)),
    )


class _Selection(NamedTuple):
    """Targets in row order without the ignored ones (`masked`: with them, as -1).

    rows_U: rows of hidden to use, None for all. place_K: position of each target in the caller's order, None for the
    same.
    """

    rows_U: Tensor | None
    target_K: Tensor
    row_start_U1: Tensor
    place_K: Tensor | None
    masked: bool

    def restore(self, values: Tensor, count: int) -> Tensor:
        """Values in the caller's order, 0 for ignored targets."""
        if self.masked:
            values = values.where(self.target_K >= 0, 0)
        return values if self.place_K is None else values.new_zeros(count).index_copy(0, self.place_K, values)


def _select_rows(rows: int, target_K: Tensor, row_K: Tensor | None, ignore_index: int) -> _Selection:
    if row_K is None and len(target_K) != rows:
        raise ValueError(f"{len(target_K)} targets for {rows} rows of hidden; give row_K when they differ")
    if torch.compiler.is_compiling():
        return _select_rows_static(rows, target_K, row_K, ignore_index)
    keep_K = target_K != ignore_index
    all_kept = bool(keep_K.all())
    if row_K is None:
        if all_kept:
            return _Selection(None, target_K.contiguous(), _arange(rows + 1, target_K), None, False)
        rows_U = keep_K.nonzero()[:, 0]
        return _Selection(rows_U, target_K[rows_U], _arange(len(rows_U) + 1, target_K), rows_U, False)
    place = None if all_kept else keep_K.nonzero()[:, 0]
    row = row_K if place is None else row_K[place]
    if len(row) and (int(row.min()) < 0 or int(row.max()) >= rows):
        raise ValueError(f"row_K holds {int(row.min())}..{int(row.max())}, hidden has {rows} rows")
    if not bool((row[1:] >= row[:-1]).all()):
        row, order = row.sort(stable=True)
        place = order if place is None else place[order]
    rows_U, counts_U = torch.unique_consecutive(row, return_counts=True)
    row_start = torch.nn.functional.pad(counts_U.cumsum(0), (1, 0))
    target = target_K.contiguous() if place is None else target_K[place]
    return _Selection(None if len(rows_U) == rows else rows_U, target, row_start, place, False)


def _select_rows_static(rows: int, target_K: Tensor, row_K: Tensor | None, ignore_index: int) -> _Selection:
    """Without shapes that depend on data, for torch.compile: every row enters the GEMM, ignored targets are masked."""
    target_K = target_K.where(target_K != ignore_index, -1)
    if row_K is None:
        return _Selection(None, target_K.contiguous(), _arange(rows + 1, target_K), None, True)
    # Ignored targets keep their place in the order, so that all shapes stay those of the arguments.
    row, order = row_K.sort(stable=True)
    row_start = torch.searchsorted(row, _arange(rows + 1, row))
    return _Selection(None, target_K[order], row_start, order, True)


def _arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.int64)


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row: Tensor | None,
    temperature: float,
    softcap: float | None,
    max_buffer_bytes: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden [T, H] and weight [Vl, H] expected, got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(
            f"hidden and weight must both be float32, bfloat16 or float64, got {hidden.dtype}, {weight.dtype}"
        )
    if target.dim() != 1 or target.dtype != torch.int64:
        raise TypeError(f"target_K must be int64 [K], got {target.dtype} {list(target.shape)}")
    if row is not None and (row.shape != target.shape or row.dtype != torch.int64):
        raise TypeError(f"row_K must be int64 {list(target.shape)} as target_K, got {row.dtype} {list(row.shape)}")
    if len({x.device for x in (hidden, weight, target, row) if x is not None}) > 1:
        raise ValueError("hidden, weight, target_K and row_K must be on one device")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if max_buffer_bytes is not None and max_buffer_bytes < 1:
        raise ValueError(f"max_buffer_bytes must be positive, got {max_buffer_bytes}")


def _choose(backend: str | None, hidden: Tensor) -> str:
    default = "reference" if hidden.dtype == torch.float64 else hidden.device.type
    name = choose(OP, backend, default)
    if name != "reference":
        if hidden.dtype == torch.float64:
            raise BackendError(f"{OP}: backend {name!r} has no float64; backend='reference' has")
        if hidden.device.type != name:
            raise BackendError(f"{OP}: backend {name!r} cannot run on tensors of device {hidden.device}")
    return name


def _check_targets(stats_RK4: Tensor, selection: _Selection, ignore_index: int) -> None:
    """Each target must lie in some shard; on CUDA the check runs on the device, without a synchronisation."""
    if torch.compiler.is_compiling():
        return
    missing = torch.isneginf(stats_RK4[..., 3].detach()).all(0)
    if missing.is_cuda:
        torch._assert_async(~missing.any(), "linear_logprob: a target lies outside the vocabulary of all shards")
    elif bool(missing.any()):
        target = int(selection.target_K[missing][0])
        raise ValueError(f"target {target} lies outside the vocabulary of all shards (ignore_index is {ignore_index})")


# ------------------------------------------------------------------------------------------------ torch.library
@torch.library.custom_op("tulu_hpc::linear_logprob_stats", mutates_args=())
def linear_logprob_stats(
    hidden_UH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Statistics [K, 4] of the local shard and, with `keep` and room for it, the logits (else an empty tensor).

    Targets are in row order: those of row u are row_start[u]:row_start[u + 1].
    """
    record(OP, backend)
    problem = blocks.Problem(
        hidden_UH, weight_VlH, target_K, row_start_U1, inv_temperature, softcap, vocab_start, max_buffer_bytes
    )
    return blocks.forward(problem, _ROWS[backend], keep)


@linear_logprob_stats.register_fake
def _stats_fake(
    hidden_UH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = blocks.Problem(
        hidden_UH, weight_VlH, target_K, row_start_U1, inv_temperature, softcap, vocab_start, max_buffer_bytes
    )
    kept = problem.blocks(allow_keep=keep, backward=False).keep
    shape = (hidden_UH.shape[0], weight_VlH.shape[0]) if kept else (0, 0)
    dtype = problem.compute_dtype
    return hidden_UH.new_empty(len(target_K), 4, dtype=dtype), hidden_UH.new_empty(shape, dtype=dtype)


@torch.library.custom_op("tulu_hpc::linear_logprob_stats_backward", mutates_args=())
def linear_logprob_stats_backward(
    grad_K4: Tensor,
    stats_K4: Tensor,
    logits: Tensor,
    hidden_UH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; one that is not needed is empty."""
    record(OP, backend)
    problem = blocks.Problem(
        hidden_UH, weight_VlH, target_K, row_start_U1, inv_temperature, softcap, vocab_start, max_buffer_bytes
    )
    grad_K4 = grad_K4.contiguous()
    return blocks.backward(problem, _ROWS[backend], stats_K4, grad_K4, logits, need_hidden, need_weight)


@linear_logprob_stats_backward.register_fake
def _backward_fake(
    grad_K4: Tensor,
    stats_K4: Tensor,
    logits: Tensor,
    hidden_UH: Tensor,
    weight_VlH: Tensor,
    target_K: Tensor,
    row_start_U1: Tensor,
    inv_temperature: float,
    softcap: float,
    vocab_start: int,
    max_buffer_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    hidden = hidden_UH.new_empty(hidden_UH.shape if need_hidden else (0,))
    return hidden, weight_VlH.new_empty(weight_VlH.shape if need_weight else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    stats, logits = output
    ctx.set_materialize_grads(False)  # else autograd would make a [U, Vl] tensor of zeros for the kept logits
    ctx.save_for_backward(*inputs[:4], stats, logits)
    ctx.constants = inputs[4:8]
    ctx.backend = inputs[9]


def _backward(ctx: Any, grad_stats: Tensor | None, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_stats is None:
        return (None,) * 10
    hidden, weight, target, row_start, stats, logits = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    grad_hidden, grad_weight = torch.ops.tulu_hpc.linear_logprob_stats_backward(
        grad_stats,
        stats,
        logits,
        hidden,
        weight,
        target,
        row_start,
        *ctx.constants,
        need_hidden,
        need_weight,
        ctx.backend,
    )
    return (grad_hidden if need_hidden else None, grad_weight if need_weight else None) + (None,) * 8


linear_logprob_stats.register_autograd(_backward, setup_context=_setup_context)
