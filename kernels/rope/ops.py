"""rope: the public function and the torch.library op under it.

Shapes: T rows, N query heads, Nk key heads, G query heads to a key head, D head dim, R rotated dims, P positions in a
table.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.registry import USABLE, BackendError, choose, constant, record, register
from tulu_hpc.kernels.rope import reference, triton_backend

OP = "rope"
register(OP, {"reference": lambda: USABLE, "triton": triton_support.status})


def rope(
    q_TND: Tensor,
    k_TND: Tensor,
    position_ids_T: Tensor | None,
    frequencies: Tensor | tuple[Tensor, Tensor],
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding [2104.09864] of packed q and k by position id; differentiable in q and k.

    Row t is turned by the angles position_ids[t] x frequency, wherever the row stands in the pack: responses that share
    a prompt restart after it. Computed in fp32 (fp64 for fp64). Dims beyond the rotated ones are copied.

    Args:
        q_TND: [T, N, D], or [T, Nk, G, D]: queries by key head, as a fused projection holds them. Any strides.
        k_TND: [T, Nk, D], of the same dtype and device.
        position_ids_T: int [T]. None with cos and sin of one row per token.
        frequencies: [R / 2] angular frequencies in radians per position, or (cos, sin): tables [P, R / 2] that
            position ids index, or [T, R / 2] when there are none. A model makes the latter once per pack for all of
            its layers (`rope_tables`).
        interleaved: pairs are (2j, 2j + 1) instead of Llama's (j, j + R / 2).
        backend: "reference" or "triton"; None: triton on CUDA where it is installed (fp64: reference).

    Returns:
        q and k turned, contiguous, in their dtype and shape.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; ids beyond a table are not checked on CUDA.
        BackendError: the backend cannot run here.
    """
    _check(q_TND, k_TND, position_ids_T)
    for label, given in (("position_ids", position_ids_T), ("frequencies", frequencies)):
        for x in (given,) if isinstance(given, Tensor) else given or ():
            if x.device != q_TND.device:
                raise ValueError(f"{label} are on {x.device}, q is on {q_TND.device}")
    if isinstance(frequencies, Tensor):
        if position_ids_T is None:
            raise ValueError("frequencies need position ids; without them give (cos, sin) of one row per token")
        if frequencies.dim() != 1:
            raise ValueError(f"frequencies are {list(frequencies.shape)}, expected [R / 2]")
        cos, sin = rope_tables(position_ids_T, frequencies)
    else:
        cos, sin = frequencies
        if cos.dim() != 2 or cos.shape != sin.shape:
            raise ValueError(f"cos is {list(cos.shape)} and sin {list(sin.shape)}, expected two [P, R / 2]")
        if position_ids_T is not None:
            cos, sin = cos.index_select(0, position_ids_T.long()), sin.index_select(0, position_ids_T.long())
    if cos.shape[0] != q_TND.shape[0]:
        raise ValueError(f"cos and sin have {cos.shape[0]} rows for {q_TND.shape[0]} tokens")
    if not 0 < 2 * cos.shape[-1] <= q_TND.shape[-1]:
        raise ValueError(f"{2 * cos.shape[-1]} rotated dims for a head dim of {q_TND.shape[-1]}")
    name = choose(OP, backend, _default(q_TND))
    if name == "triton":
        triton_support.check_device(OP, q_TND)
        if q_TND.dtype == torch.float64:
            raise BackendError(f"{OP}: backend 'triton' computes in fp32, float64 needs backend='reference'")
    wide = torch.float64 if q_TND.dtype == torch.float64 else torch.float32
    return torch.ops.tulu_hpc.rope(q_TND, k_TND, cos.to(wide), sin.to(wide), interleaved, False, name)


def rope_tables(position_ids_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R / 2] of position id x frequency, in fp32 (fp64 for fp64 frequencies)."""
    return reference.tables(position_ids_T, inv_freq if inv_freq.dtype == torch.float64 else inv_freq.float())


def _default(q_TND: Tensor) -> str:
    if not q_TND.is_cuda or q_TND.dtype == torch.float64:
        return "reference"
    return _default_on_cuda()


@constant
def _default_on_cuda() -> str:
    status = triton_support.status()
    if status != USABLE:
        _say_plain(status)
    return "triton" if status == USABLE else "reference"


@functools.cache
def _say_plain(reason: str) -> None:
    """Once per reason."""
    warnings.warn(f"{OP}: plain torch runs on CUDA, many launches instead of one, because {reason}", stacklevel=5)


def _check(q_TND: Tensor, k_TND: Tensor, position_ids_T: Tensor | None) -> None:
    for label, x, dims in (("q", q_TND, (3, 4)), ("k", k_TND, (3,))):
        if x.dim() not in dims or x.shape[0] != q_TND.shape[0] or x.shape[-1] != q_TND.shape[-1]:
            raise ValueError(
                f"{label} is {list(x.shape)}, expected [T, heads, D] with T and D of q {list(q_TND.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{label} is {x.dtype}, expected a floating-point tensor")
        if x.dtype != q_TND.dtype or x.device != q_TND.device:
            raise TypeError(f"{label} is {x.dtype} on {x.device}, q is {q_TND.dtype} on {q_TND.device}")
    if position_ids_T is not None:
        if position_ids_T.shape != q_TND.shape[:1]:
            raise ValueError(f"position_ids is {list(position_ids_T.shape)}, expected [{q_TND.shape[0]}]")
        if position_ids_T.is_floating_point():
            raise TypeError(f"position_ids is {position_ids_T.dtype}, expected integers")


# ------------------------------------------------------------------------------------------------ torch.library
@torch.library.custom_op(
    "tulu_hpc::rope",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool back, str backend) -> (Tensor, Tensor)",
)
def rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """q and k turned by cos, sin [T, R / 2], or turned back; its gradient is itself with `back` reversed."""
    record(OP, backend)
    if backend == "triton":
        with torch.cuda.device_of(q):  # Triton launches on the current device
            return triton_backend.forward(q, k, cos, sin, interleaved, -1.0 if back else 1.0)
    return reference.forward(q, k, cos, -sin if back else sin, interleaved)


@rope_op.register_fake
def _rope_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.back, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    turned = torch.ops.tulu_hpc.rope(grad_q, grad_k, cos, sin, ctx.interleaved, not ctx.back, ctx.backend)
    return (*turned, None, None, None, None, None)


rope_op.register_autograd(_backward, setup_context=_setup_context)
