"""linear_logprob: the public function.

Shapes: T rows of hidden, U rows that have targets, K targets, H hidden, V vocabulary, Vl its local shard.

The op `tulu_hpc::linear_logprob_stats` (`library`) works on one shard and returns per-target statistics (`problem`);
their exchange between ranks and the merge are plain torch around it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.linear_logprob import tensor_parallel
from tulu_hpc.kernels.linear_logprob.library import OP, ROWS
from tulu_hpc.kernels.linear_logprob.selection import Selection, select_rows
from tulu_hpc.kernels.native import core_status, cuda_status
from tulu_hpc.kernels.registry import USABLE, BackendError, choose, register

DEFAULT_BUFFER_BYTES = 256 * 2**20
register(OP, {"reference": lambda: USABLE, "cpu": core_status, "cuda": cuda_status, "triton": triton_support.status})


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
    batch_invariant: bool = False,
    backend: str | None = None,
) -> LogprobOutput:
    """Log-probs, and entropies on request, of `target_K` under softmax(softcap(hidden weight^T) / temperature).

    Differentiable in hidden and weight for any upstream gradient of both outputs. The logits exist only in blocks; they
    are kept for the backward pass when they fit into `max_buffer_bytes` (6 N H V FLOPs in all), else each block is
    computed again (8 N H V). Only rows with a target that is not ignored enter the GEMMs, each once.
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
        max_buffer_bytes: bound on memory beyond arguments and gradients, default 256 MiB: logits, scratch, fp32 sums,
            copies of used rows and of padded operands. `buffers.extra_bytes` says what a call takes, also where sums
            alone need more than the bound. "triton" and the rows that `sequence_parallel` gathers are outside it.
        batch_invariant: the outputs of a target are bitwise the same whatever other targets and rows are in the call,
            in whatever order ("reference": one row at a time; "cpu" and "triton": blocks of a fixed shape). Gradients
            are not.
        backend: "reference", "cpu", "cuda" or "triton" (logits in registers only: 10 N H V FLOPs, least memory); None
            chooses by device.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or values; a budget that holds no block.
        BackendError: the backend cannot run here, or offers no batch invariance.
    """
    _check(hidden_TH, weight_VlH, target_K, row_K, temperature, softcap, max_buffer_bytes)
    ranks = tp_group.size() if tp_group is not None else 1
    name = _choose(backend, hidden_TH, batch_invariant)
    gather = tp_group is not None and ranks > 1 and sequence_parallel
    if vocab_start is None:
        vocab_start = tp_group.rank() * weight_VlH.shape[0] if tp_group is not None else 0
    selection = select_rows(hidden_TH.shape[0] * (ranks if gather else 1), target_K, row_K, ignore_index)
    keep = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VlH.requires_grad)
    stats_K4, _, _ = torch.ops.tulu_hpc.linear_logprob_stats(
        hidden_TH.contiguous(),
        weight_VlH.contiguous(),
        selection.target_K,
        selection.row_start_U1,
        selection.rows_U,
        1.0 / temperature,
        softcap or 0.0,
        vocab_start,
        DEFAULT_BUFFER_BYTES if max_buffer_bytes is None else max_buffer_bytes,
        name,
        tp_group.group_name if tp_group is not None and ranks > 1 else "",
        sequence_parallel,
        keep,
        batch_invariant,
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


def _choose(backend: str | None, hidden: Tensor, batch_invariant: bool) -> str:
    default = "reference" if hidden.dtype == torch.float64 else hidden.device.type
    name = choose(OP, backend, "triton" if default == "cuda" and batch_invariant else default)
    if name != "reference":
        if hidden.dtype == torch.float64:
            raise BackendError(f"{OP}: backend {name!r} has no float64; backend='reference' has")
        if name == "triton":
            triton_support.check_device(OP, hidden)
        elif hidden.device.type != name:
            raise BackendError(f"{OP}: backend {name!r} cannot run on tensors of device {hidden.device}")
    if batch_invariant and name != "triton" and ROWS[name].invariant_rows is None:
        raise BackendError(
            f"{OP}: backend {name!r} offers no batch_invariant: its GEMM library may add in another order for other "
            "rows; backend='triton' does"
        )
    return name


def _check_targets(stats_RK4: Tensor, selection: Selection, ignore_index: int) -> None:
    """Each target must lie in some shard; on CUDA the check runs on the device, without a synchronisation."""
    if torch.compiler.is_compiling():
        return
    missing = torch.isneginf(stats_RK4[..., 3].detach()).all(0)
    if missing.is_cuda:
        torch._assert_async(~missing.any(), "linear_logprob: a target lies outside the vocabulary of all shards")
    elif bool(missing.any()):
        target = int(selection.target_K[missing][0])
        raise ValueError(f"target {target} lies outside the vocabulary of all shards (ignore_index is {ignore_index})")
