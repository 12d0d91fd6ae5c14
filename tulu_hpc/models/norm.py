"""RMSNorm in megatron's norm slots."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm [1910.07467] over the last dimension.

    megatron's own wrapper around torch norms refuses sequence parallelism; the norm itself is fine under it: each rank
    normalises its rows, and the weight only needs its gradient summed over the tensor-parallel ranks, which megatron
    does for weights marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
