"""Rotary position embedding in plain torch: the specification.

Shapes: T rows, N query heads, Nk key heads, D head dim, R rotated dims (R <= D, even), P positions in a table.

A pair (x1, x2) of row t and frequency w_j becomes (x1 c - x2 s, x2 c + x1 s) with c = cos(p_t w_j), s = sin(p_t w_j)
[RoFormer, 2104.09864]. Pairs are (j, j + R/2) in Llama's convention of transformers and megatron ("half-split"), and
(2j, 2j + 1) interleaved, the paper's. Dims from R on are copied. The gradient is the rotation back, s -> -s.
"""

import torch
from torch import Tensor


def tables(position_ids_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R / 2] of position x frequency, computed in the dtype of `inv_freq` (fp32 or fp64)."""
    angle = position_ids_T.to(inv_freq.dtype)[:, None] * inv_freq
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One tensor [T, ..., D] by cos, sin [T, R / 2], in fp32 (fp64 for fp64), in the dtype of x and contiguous."""
    half = cos.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_row = len(cos), *(1,) * (x.dim() - 2), half
    c, s = cos.to(wide).view(per_row), sin.to(wide).view(per_row)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    x1, x2 = x[..., first].to(wide), x[..., second].to(wide)
    # In place where it can be, because on CPU every further temporary costs as much as the arithmetic.
    for place, this, other, signed in ((first, x1, x2, -s), (second, x2, x1, s)):
        if x.dtype == wide:
            torch.mul(this, c, out=out[..., place]).addcmul_(other, signed)
        else:
            out[..., place] = (this * c).addcmul_(other, signed)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both tensors."""
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
