"""packed_attention: the public function and the torch.library op under it.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.packed_attention import cpu, flash, reference, triton_backend
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, plan_of, same_device
from tulu_hpc.kernels.packed_attention.select import default, refusal
from tulu_hpc.kernels.registry import USABLE, BackendError, choose, constant, record, register

OP = "packed_attention"
_BACKENDS: dict[str, Any] = {"reference": reference, "cpu": cpu, "triton": triton_backend, **flash.BACKENDS}
register(
    OP,
    {"reference": lambda: USABLE, "cpu": cpu.status, "triton": triton_support.status, flash.NAME: flash.status}
    | {name: functools.partial(flash.status, name.partition(":")[2]) for name in flash.NAMED},
)


def packed_attention(
    q_TND: Tensor,
    k_MND: Tensor,
    v_MND: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of packed segments that may see a shared prefix; differentiable in q, k and v.

    Args:
        q_TND: [T, N, D], the plan's query rows.
        k_MND, v_MND: [M, Nk, D], all rows of the pack (in the plan's key order).
        plan: from `plan_attention`, for these sizes and this device.
        scale: of the scores; default D ** -0.5.
        backend: "reference" (dense mask), "cpu", "triton" or "flash"; None chooses by device: "cpu" on CPU; on CUDA
            "flash", "triton" for what flash does not take (fp32, unusual head dims), and "reference" for what neither
            takes (fp64): right, but with a [N, T, M] score matrix. "flash" runs the best library that is installed for
            the GPU; "flash:aten", "flash:fa2", "flash:fa3", "flash:fa4" and "flash:te" (cuDNN by Transformer Engine)
            name one. `plan.describe()` says which and why.

    Returns:
        [T, N, D] in the dtype of q.

    Raises:
        ValueError: the tensors do not fit the plan.
        BackendError: the backend cannot run here.
    """
    name = choose(OP, backend, _default_backend(q_TND))
    for label, x, shape in (
        ("q", q_TND, (plan.num_queries, plan.heads, plan.head_dim)),
        ("k", k_MND, (plan.num_keys, plan.kv_heads, plan.head_dim)),
        ("v", v_MND, (plan.num_keys, plan.kv_heads, plan.head_dim)),
    ):
        if x.shape != shape:
            raise ValueError(f"{label} is {list(x.shape)}, the plan is for {list(shape)}")
        if x.dtype != q_TND.dtype:
            raise ValueError(f"{label} is {x.dtype}, q is {q_TND.dtype}")
        if not same_device(x.device, plan.device):
            raise ValueError(f"{label} is on {x.device}, the plan is for {plan.device}")
    reason = refusal(name, q_TND.device.type, q_TND.dtype, plan.head_dim)
    if reason is not None:
        raise BackendError(f"{OP}: backend {name!r} {reason}; backend='reference' takes all")
    if name == flash.NAME:
        name = flash.resolve(q_TND.dtype, plan.head_dim)
    scale = plan.head_dim**-0.5 if scale is None else scale
    return torch.ops.tulu_hpc.packed_attention(q_TND, k_MND, v_MND, plan.handle, scale, name)[0]


@constant
def _default_choice(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    choice = default(device_type, dtype, head_dim)
    if choice.warn:
        _say_dense(choice.reason)
    return choice.backend


def _default_backend(q_TND: Tensor) -> str:
    return _default_choice(q_TND.device.type, q_TND.dtype, q_TND.shape[-1])


@functools.cache
def _say_dense(reason: str) -> None:
    """Once per reason: the dense route is exact, but nobody should train on it without knowing."""
    warnings.warn(
        f"{OP}: the dense reference runs, with a score matrix per head, because {reason}. Use bfloat16 for speed.",
        stacklevel=4,
    )


# ------------------------------------------------------------------------------------------------ torch.library
@torch.library.custom_op(
    "tulu_hpc::packed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, SymInt plan, float scale, str backend) -> (Tensor, Tensor)",
)
def attention_op(q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Output [T, N, D] and log-sum-exp [T, N]; `plan` is the handle of an AttentionPlan that is alive."""
    record(OP, backend)
    with torch.cuda.device_of(q):  # Triton and the libraries launch on the current device
        out, lse = _BACKENDS[backend].forward(q.contiguous(), k.contiguous(), v.contiguous(), plan_of(plan), scale)
    return out, lse


@attention_op.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op(
    "tulu_hpc::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt plan, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: int, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    record(OP, backend)
    q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
    with torch.cuda.device_of(q):
        return _BACKENDS[backend].backward(grad, q, k, v, out, lse, plan_of(plan), scale)


@attention_backward_op.register_fake
def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: int, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.handle, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)
    # Keeps the plan alive until the backward pass; a compiled graph has only the number, its caller holds the plan.
    ctx.plan = plan_of(ctx.handle) if isinstance(ctx.handle, int) and not torch.compiler.is_compiling() else None


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, out, lse = ctx.saved_tensors
    grads = torch.ops.tulu_hpc.packed_attention_backward(grad, q, k, v, out, lse, ctx.handle, ctx.scale, ctx.backend)
    return (*grads, None, None, None)


attention_op.register_autograd(_backward, setup_context=_setup_context)
