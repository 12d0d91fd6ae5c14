"""value_loss: the clipped loss of a value head beside policy_loss.  Shapes: K tokens.

v_clip = old + clip(v - old, -clip, clip)
loss   = scale sum_k weight_k / 2 max((v_k - return_k)^2, (v_clip_k - return_k)^2)
The clip of PPO's reference implementation (openai/baselines ppo2; arXiv 2005.12729 section 3); no gradient where the
clipped error is the larger one.
"""

from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.native import check, core, core_status
from tulu_hpc.kernels.registry import USABLE, BackendError, LossOutput, choose, record, register

OP = "value_loss"
NAMES = ("value/loss", "value/clip_fraction", "value/squared_error", "value/value")
register(OP, {"reference": lambda: USABLE, "cpu": core_status, "triton": triton_support.status})


def value_loss(
    values_K: Tensor,
    old_values_K: Tensor,
    returns_K: Tensor,
    *,
    clip: float | None = 0.2,
    weights_K: Tensor | None = None,
    normalisation: str = "sum",
    divisor: float | None = None,
    backend: str | None = None,
) -> LossOutput:
    """Clipped squared error of values; the formula is above.

    Args:
        values_K: of the value head, fp32 (fp64: reference backend), differentiable.
        old_values_K: of the head before the first update.
        returns_K: targets, see `gae`.
        clip: > 0, how far a value may move from the old one; None: no clip.
        weights_K: weight of each token; None = 1.
        normalisation: "sum", "token_mean" (over the tokens of the call) or "constant" (sum over `divisor`).
        backend: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        loss: scalar. metrics: sums over tokens, without weights, of value/{loss,clip_fraction,squared_error,value};
        clip_fraction counts the values that moved by more than `clip`.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or values.
        BackendError: the backend cannot run.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    if normalisation not in ("sum", "token_mean", "constant"):
        raise ValueError(f"normalisation must be sum, token_mean or constant, got {normalisation!r}")
    if (normalisation == "constant") != (divisor is not None) or (divisor is not None and not divisor > 0):
        raise ValueError(f"normalisation 'constant', and no other, needs a positive divisor, got {divisor}")
    if values_K.dim() != 1 or values_K.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"values_K must be float32 or float64 [K], got {values_K.dtype} {list(values_K.shape)}")
    for label, tensor in (("old_values_K", old_values_K), ("returns_K", returns_K), ("weights_K", weights_K)):
        if tensor is None:
            continue
        if tensor.dtype != values_K.dtype:
            raise TypeError(f"{label} must be {values_K.dtype}, got {tensor.dtype}")
        if tensor.shape != values_K.shape or tensor.device != values_K.device:
            raise ValueError(
                f"{label} must be {list(values_K.shape)} on {values_K.device} as values_K, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
    scale = 1 / max(len(values_K), 1) if normalisation == "token_mean" else 1 / (divisor or 1.0)
    loss, _, sums_4 = torch.ops.tulu_hpc.value_loss(
        values_K.contiguous(),
        old_values_K.contiguous(),
        returns_K.contiguous(),
        None if weights_K is None else weights_K.contiguous(),
        float("inf") if clip is None else clip,
        scale,
        _choose(backend, values_K),
    )
    sums_4 = sums_4.detach()
    return LossOutput(loss, {name: sums_4[index] for index, name in enumerate(NAMES)})


def _choose(backend: str | None, values_K: Tensor) -> str:
    double = values_K.dtype == torch.float64
    name = choose(OP, backend, "reference" if double else "triton" if values_K.is_cuda else "cpu")
    if name != "reference" and double:
        raise BackendError(f"{OP}: backend {name!r} has no float64; backend='reference' has")
    if name == "cpu" and values_K.device.type != "cpu":
        raise BackendError(f"{OP}: backend 'cpu' cannot run on tensors of device {values_K.device}")
    if name == "triton":
        triton_support.check_device(OP, values_K)
    return name


def evaluate(
    values_K: Tensor, old_K: Tensor, returns_K: Tensor, weights_K: Tensor | None, clip: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and sums in plain torch: the specification."""
    moved_K = values_K - old_K
    far_K = moved_K.abs() > clip
    held_K = (old_K + moved_K.clamp(-clip, clip)).where(far_K, values_K)
    error_K = values_K - returns_K
    square_K, held_square_K = error_K.square(), (held_K - returns_K).square()
    half_K = torch.maximum(square_K, held_square_K) / 2
    weight_K = torch.full_like(values_K, scale) if weights_K is None else scale * weights_K
    gradient_K = (weight_K * error_K).masked_fill(far_K & (held_square_K > square_K), 0)
    sums = (half_K.sum(), far_K.sum().to(values_K.dtype), square_K.sum(), values_K.sum())
    return (weight_K * half_K).sum(), gradient_K, torch.stack(sums)


@torch.library.custom_op("tulu_hpc::value_loss", mutates_args=())
def value_loss_op(
    values_K: Tensor,
    old_values_K: Tensor,
    returns_K: Tensor,
    weights_K: Tensor | None,
    clip: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient, and the sums of `NAMES`."""
    record(OP, backend)
    if backend == "reference":
        return evaluate(values_K, old_values_K, returns_K, weights_K, clip, scale)
    if backend == "triton":
        from tulu_hpc.kernels.policy_loss import triton_kernels

        with torch.cuda.device_of(values_K):
            return triton_kernels.value_loss(values_K, old_values_K, returns_K, weights_K, clip, scale)
    loss, gradient_K, sums_4 = outputs = _fake(values_K)
    code = core().value_loss_cpu(
        values_K.data_ptr(),
        old_values_K.data_ptr(),
        returns_K.data_ptr(),
        0 if weights_K is None else weights_K.data_ptr(),
        len(values_K),
        clip,
        scale,
        gradient_K.data_ptr(),
        loss.data_ptr(),
        sums_4.data_ptr(),
        torch.get_num_threads(),
    )
    check(code, "value_loss (cpu)")
    return outputs


@value_loss_op.register_fake
def _fake(values_K: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return values_K.new_empty(()), torch.empty_like(values_K), values_K.new_empty(len(NAMES))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = None if grad_loss is None else ctx.saved_tensors[0] * grad_loss
    return (gradient, *[None] * 6)


value_loss_op.register_autograd(_backward, setup_context=_setup_context)
