"""CUDA backend: torch's flash attention ops for variable lengths (FlashAttention 2; 3 and 4 where activated).

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim.
Both ops keep the flash contract: forward returns the log-sum-exp, backward takes any output and log-sum-exp.
"""

from functools import cache

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.parts import merge, sum_copies
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, VarlenCall
from tulu_hpc.kernels.registry import USABLE

_aten = torch.ops.aten
_FORWARD = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
_BACKWARD = ("grad_out", *_FORWARD[:3], "out", "logsumexp", *_FORWARD[3:], "rng_state", "unused")


@cache
def _schemas() -> str:
    """These ops are not public: their argument order is checked before they are used."""
    for name, wanted in (("_flash_attention_forward", _FORWARD), ("_flash_attention_backward", _BACKWARD)):
        op = getattr(_aten, name, None)
        if op is None:
            return f"this torch ({torch.__version__}) has no aten::{name}"
        names = tuple(argument.name for argument in op.default._schema.arguments)
        if names[: len(wanted)] != wanted:
            return f"aten::{name} of this torch ({torch.__version__}) takes {names}, expected {wanted}"
    return USABLE


def status() -> str:
    """ "usable" or why not."""
    if _schemas() != USABLE:
        return _schemas()
    return USABLE if torch.cuda.is_available() else "torch sees no CUDA device"


def refusal(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend does not take such tensors, None if it does."""
    if dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return None
    return f"takes bfloat16 or float16 with a head dim that is a multiple of 8 up to 256, got {dtype} with {head_dim}"


def _keys(x: Tensor, call: VarlenCall) -> Tensor:
    return x[call.key_start : call.key_stop] if call.key_index is None else x.index_select(0, call.key_index)


def _key_gradient(total: Tensor | None, part: Tensor, call: VarlenCall, alone: bool) -> Tensor:
    """total + the gradients of the call's keys, in fp32 and in the plan's order; `alone`: the only call of the plan."""
    if call.key_index is None:
        assert total is not None
        total[call.key_start : call.key_stop] += part
        return total
    assert call.copy_order is not None and call.copy_offsets is not None
    # The sum is in fp32 either way; the only call's is rounded at once.
    added = sum_copies(part, call.copy_order, call.copy_offsets, part.dtype if alone else torch.float32)
    return added if total is None else total.add_(added)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and log-sum-exp [T, N]."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    for number, call in enumerate(plan.calls):
        rows = slice(call.query_start, call.query_stop)
        part_out, part_lse, *_ = _aten._flash_attention_forward(
            q[rows],
            _keys(k, call),
            _keys(v, call),
            call.cu_query,
            call.cu_key,
            max(call.query_lengths),
            max(call.key_lengths),
            0.0,
            call.causal,
            False,
            scale=scale,
        )
        if number == 0:
            out[rows], lse[rows] = part_out, part_lse.t()
        else:
            merge(out[rows], lse[rows], part_out, part_lse.t())
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; sums over calls and copies in fp32."""
    alone = len(plan.calls) == 1
    zeros = lambda x: torch.zeros(x.shape, dtype=torch.float32, device=x.device)  # noqa: E731
    dq = zeros(q)
    direct = alone and plan.calls[0].key_index is not None
    dk, dv = (None, None) if direct else (zeros(k), zeros(v))
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    for call in plan.calls:
        rows = slice(call.query_start, call.query_stop)
        part_dq, part_dk, part_dv = _aten._flash_attention_backward(
            grad[rows],
            q[rows],
            _keys(k, call),
            _keys(v, call),
            out[rows],
            lse[rows].t().contiguous(),
            call.cu_query,
            call.cu_key,
            max(call.query_lengths),
            max(call.key_lengths),
            0.0,
            call.causal,
            rng_state,
            unused,
            scale=scale,
        )
        dq[rows] += part_dq
        dk = _key_gradient(dk, part_dk, call, alone)
        dv = _key_gradient(dv, part_dv, call, alone)
    assert dk is not None and dv is not None
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
