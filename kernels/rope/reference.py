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


def rotate(x_TND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One tensor by cos, sin [T, R / 2], in fp32 (fp64 for fp64), in the dtype of x."""
    half = cos.shape[-1]
    wide = torch.float64 if x_TND.dtype == torch.float64 else torch.float32
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]
    turned = x_TND[..., : 2 * half].to(wide)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * c - second * s, second * c + first * s)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out.to(x_TND.dtype), x_TND[..., 2 * half :]), -1)


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both tensors."""
    return rotate(q, cos, sin, interleaved).contiguous(), rotate(k, cos, sin, interleaved).contiguous()
