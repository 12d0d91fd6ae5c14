"""Rotary position embedding [2104.09864] by position id, with Llama 3's frequency scaling.

Shapes: T rows, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.config.architecture import Architecture


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """[D / 2] float32 angular frequencies (radians per token), equal to transformers' for every scaling parameter.

    Llama 3 scaling [Llama 3.1 model card]: wavelengths beyond original / low_freq_factor are slowed down by `factor`,
    those below original / high_freq_factor stay, those between are interpolated.
    """
    dim = architecture.head_dim
    base = 1.0 / (architecture.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    scaling = architecture.rope_scaling
    if scaling is None:
        return base
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / base
    slowed = torch.where(wavelength > original / low, base / scaling.factor, base)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / scaling.factor + smooth * slowed
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, between, slowed)


def angles(position_ids_T: Tensor, inverse_frequency: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, T, 1, 1, D / 2] cosines and sines of position x frequency, computed in float32, returned in `dtype`."""
    angle = position_ids_T.to(inverse_frequency.dtype)[:, None] * inverse_frequency
    return torch.stack((angle.cos(), angle.sin())).to(dtype)[:, :, None, None]


class _Rotate(torch.autograd.Function):
    """Rotates each pair (i, i + D/2); the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sin)
        return _rotated(x, cos_sin[0], cos_sin[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (cos_sin,) = ctx.saved_tensors
        return _rotated(gradient, cos_sin[0], -cos_sin[1]), None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = first.shape[-1]
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half:])
    return out


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate `x` [T, ..., D] (two dimensions between) by `angles(...)` [2, T, 1, 1, D / 2]."""
    return _Rotate.apply(x, cos_sin)
