"""Frequencies and angles of rotary position embedding [2104.09864], with Llama 3's scaling; `kernels.rope` rotates.

Shapes: T rows, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.kernels import rope_tables


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


def angles(position_ids_T: Tensor, inverse_frequency: Tensor) -> Tensor:
    """[2, T, D / 2] float32 cosines and sines of position x frequency: made once for all layers."""
    return torch.stack(rope_tables(position_ids_T, inverse_frequency))
