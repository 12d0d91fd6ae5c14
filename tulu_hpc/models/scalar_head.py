"""A head of one number per row: reward and value models. Shapes: T rows of this rank, H hidden."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

Head = Literal["logprobs", "value"]


class RowValues(NamedTuple):
    """What the last pipeline stage of a model with a scalar head returns for a pack.

    Attributes:
        values_T: [T] fp32, the number of each row that this context-parallel rank holds; the same on its
            tensor-parallel ranks. `values_T[batch.params.row_K]` belongs to the targets: the value of the state in
            which each was chosen.
    """

    values_T: Tensor


class ScalarHead(nn.Module):
    """hidden @ weight, in fp32 whatever the dtype of the model; no bias, as transformers' sequence classification.

    The weight is small, so every tensor-parallel rank holds all of it. Under sequence parallelism a rank multiplies its
    own rows only, and megatron adds up the gradients of the weight over those ranks (`sequence_parallel` mark).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._gather = config.sequence_parallel

    def forward(self, hidden_TH: Tensor, tp_group: torch.distributed.ProcessGroup) -> Tensor:
        """[T] fp32; under sequence parallelism hidden_TH has T / tp rows, and all T come back on every rank."""
        values_T = hidden_TH.float() @ self.weight[0].float()
        if self._gather:
            # Every rank computes the same loss of the same numbers: each takes its own rows of the gradient, no sum.
            values_T = tensor_parallel.gather_from_sequence_parallel_region(
                values_T, tensor_parallel_output_grad=False, group=tp_group
            )
        return values_T


def new_head_weight(hidden_size: int, seed: int) -> Tensor:
    """[1, H] fp32 from N(0, 1 / sqrt(H + 1)), the same on every rank [2009.01325, and the code behind Tulu 3]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(1, hidden_size).normal_(0.0, 1.0 / math.sqrt(hidden_size + 1), generator=generator)
