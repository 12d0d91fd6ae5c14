"""value_loss in one Triton launch. Imports triton: import it inside functions only.  Shapes: K tokens, P programs."""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_hpc.kernels.ahead_of_time import Case

_BLOCK = 512
_PARTIAL_ROWS = 128


@triton.jit(do_not_specialize=["tokens"])
def value_kernel(
    values, old_values, returns, weights, gradient, loss, sums, partials, counter, tokens, clip, scale,
    HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program leaves its five sums; the last one to finish adds them in the order of programs."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < tokens
    value = tl.load(values + k, mask=inside, other=0.0)
    old = tl.load(old_values + k, mask=inside, other=0.0)
    target = tl.load(returns + k, mask=inside, other=0.0)
    weight = tl.where(inside, scale, 0.0)
    if HAS_WEIGHTS:
        weight = weight * tl.load(weights + k, mask=inside, other=0.0)
    moved = value - old
    above, below = moved > clip, moved < -clip
    far = above | below
    held = tl.where(above, old + clip, tl.where(below, old - clip, value)) - target
    error = value - target
    use_held = far & (held * held > error * error)
    half = 0.5 * tl.where(use_held, held * held, error * error)
    tl.store(gradient + k, tl.where(use_held, 0.0, weight * error), mask=inside)
    column = tl.arange(0, 8)
    row_8 = tl.where(column == 0, tl.sum(half, 0), 0.0)
    row_8 = tl.where(column == 1, tl.sum(far.to(tl.float32), 0), row_8)
    row_8 = tl.where(column == 2, tl.sum(error * error, 0), row_8)
    row_8 = tl.where(column == 3, tl.sum(value, 0), row_8)
    row_8 = tl.where(column == 4, tl.sum(weight * half, 0), row_8)
    tl.store(partials + tl.program_id(0) * 8 + column, row_8)
    tl.debug_barrier()  # all threads have stored before the one that counts does
    programs = tl.num_programs(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        total_8 = tl.zeros((8,), tl.float64)
        for start in range(0, programs, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            part = tl.load(partials + row * 8 + column[None, :], mask=row < programs, other=0.0, cache_modifier=".cg")
            total_8 += tl.sum(part.to(tl.float64), 0)
        result_8 = total_8.to(tl.float32)
        tl.store(sums + column, result_8, mask=column < 4)
        tl.store(loss + column * 0, result_8, mask=column == 4)
        tl.store(counter, 0)


def launch(
    values_K: Tensor,
    old_K: Tensor,
    returns_K: Tensor,
    weights_K: Tensor | None,
    clip: float,
    scale: float,
    loss: Tensor,
    gradient_K: Tensor,
    sums_4: Tensor,
    counter: Tensor,
) -> None:
    """Writes to the last arguments but `counter`, which is zero before and after."""
    programs = max(triton.cdiv(len(values_K), _BLOCK), 1)
    value_kernel[(programs,)](
        values_K,
        old_K,
        returns_K,
        values_K if weights_K is None else weights_K,
        gradient_K,
        loss,
        sums_4,
        torch.empty(programs, 8, dtype=torch.float32, device=values_K.device),
        counter,
        len(values_K),
        clip,
        scale,
        HAS_WEIGHTS=weights_K is not None,
        BLOCK=_BLOCK,
        ROWS=_PARTIAL_ROWS,
    )


def cases() -> list[Case]:
    """For `triton_kernels.ahead_of_time`."""
    pointers = ("values", "old_values", "returns", "weights", "gradient", "loss", "sums", "partials", "counter")
    signature = {
        **dict.fromkeys(pointers, "*fp32"),
        "counter": "*i32",
        "tokens": "i32",
        "clip": "fp32",
        "scale": "fp32",
    }
    constants = {"HAS_WEIGHTS": True, "BLOCK": _BLOCK, "ROWS": _PARTIAL_ROWS}
    return [Case("policy_loss/value", value_kernel, signature, constants, aligned=pointers)]
