"""CPU backend: torch's flash attention for CPU, which returns the log-sum-exp and takes any in its backward pass.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim; batches as in `padded`.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.padded import PaddedBatch
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, VarlenCall
from tulu_hpc.kernels.registry import USABLE

_aten = torch.ops.aten


def status() -> str:
    """ "usable" when this torch has the two ops."""
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
    return (
        USABLE if all(hasattr(_aten, name) for name in names) else f"this torch ({torch.__version__}) lacks {names[0]}"
    )


def _take(x: Tensor, rows: Tensor | slice, batch: int) -> Tensor:
    """Rows of [T, N, D] as a [B, N, L, D] view of themselves or of a copy."""
    taken = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    return taken.unflatten(0, (batch, -1)).transpose(1, 2)


def _take_real(x: Tensor, part: PaddedBatch) -> Tensor:
    """As `_take` for query rows, with zeros in the padding."""
    if part.place is None:
        return _take(x, part.query_rows, part.batch)
    flat = x.new_zeros(part.batch * part.query_length, *x.shape[1:])
    flat.index_copy_(0, part.place, x.index_select(0, _tensor(part.real_rows)))
    return flat.unflatten(0, (part.batch, -1)).transpose(1, 2)


def _tensor(rows: Tensor | slice) -> Tensor:
    assert isinstance(rows, Tensor)
    return rows


def _put(target: Tensor, values_BNLD: Tensor, part: PaddedBatch) -> None:
    """Writes the real queries' values to their rows of `target`."""
    flat = values_BNLD.transpose(1, 2).flatten(0, 1)
    if part.place is not None:
        flat = flat.index_select(0, part.place)
    if isinstance(part.real_rows, slice):
        target[part.real_rows] = flat
    else:
        target.index_copy_(0, part.real_rows, flat)


def _mask(part: PaddedBatch, dtype: torch.dtype) -> Tensor | None:
    return None if part.mask is None else part.mask.to(dtype)


def call_forward(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float, out: Tensor, lse: Tensor) -> None:
    """Writes the call's rows of out [T, N, D] and lse [T, N]."""
    for part in call.padded:
        rows = (_take(q, part.query_rows, part.batch), *(_take(x, part.key_rows, part.batch) for x in (k, v)))
        o, l = _aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: E741
            *rows, 0.0, part.causal, attn_mask=_mask(part, q.dtype), scale=scale
        )
        _put(out, o, part)
        _put(lse, l, part)


def call_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: VarlenCall,
    scale: float,
    totals: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Adds the call's gradients to totals = (dq, dk, dv), which are fp32 (fp64 for fp64); the order is fixed."""
    dq_total, dk_total, dv_total = totals
    for part in call.padded:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _take_real(grad, part),
            _take(q, part.query_rows, part.batch),
            _take(k, part.key_rows, part.batch),
            _take(v, part.key_rows, part.batch),
            _take(out, part.query_rows, part.batch),
            _take(lse, part.query_rows, part.batch),
            0.0,
            part.causal,
            attn_mask=_mask(part, q.dtype),
            scale=scale,
        )
        flat = dq.transpose(1, 2).flatten(0, 1)
        _add(dq_total, flat if part.place is None else flat.index_select(0, part.place), part.real_rows)
        _add(dk_total, dk.transpose(1, 2).flatten(0, 1), part.key_rows)
        _add(dv_total, dv.transpose(1, 2).flatten(0, 1), part.key_rows)


def _add(total: Tensor, values: Tensor, rows: Tensor | slice) -> None:
    if isinstance(rows, slice):
        total[rows] += values
    else:
        total.index_add_(0, rows, values.to(total.dtype))


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and log-sum-exp [T, N] of the whole plan."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=wide)
    for number, call in enumerate(plan.calls):
        if number == 0:
            call_forward(q, k, v, call, scale, out, lse)
            continue
        part_out, part_lse = torch.empty_like(out), torch.empty_like(lse)
        call_forward(q, k, v, call, scale, part_out, part_lse)
        merge(out, lse, part_out, part_lse, slice(call.query_start, call.query_stop))
    return out, lse


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: slice) -> None:
    """Merges a second call's output on the same queries into (out, lse), in the precision of the log-sum-exp."""
    total = torch.logaddexp(lse[rows], part_lse[rows])
    first = (lse[rows] - total).exp_().unsqueeze(-1)
    second = (part_lse[rows] - total).exp_().unsqueeze(-1)
    out[rows] = (out[rows] * first + part_out[rows] * second).to(out.dtype)
    lse[rows] = total


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; sums over copies and calls in fp32 (fp64 for fp64)."""
    totals = tuple(torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    dq, dk, dv = totals
    for call in plan.calls:
        call_backward(grad, q, k, v, out, lse, call, scale, (dq, dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
