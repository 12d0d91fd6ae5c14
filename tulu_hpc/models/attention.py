"""Attention modules in megatron's layer spec: rotation by position id, prefix-shared attention over packs.

Shapes: T rows of this rank, N query heads, Nk key/value heads (of one tensor-parallel rank), D head dim, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tulu_hpc.kernels import packed_attention, rope
from tulu_hpc.models.cache import DecodeParams
from tulu_hpc.parallel.context import PackParams


class CoreAttention(MegatronModule):
    """softmax(q k^T) v of a pack (`PackParams`) or of one decoding step (`DecodeParams`).

    With context parallelism K and V are all-gathered first (backward: reduce-scatter); the plan then covers this rank's
    rows against the keys of the whole pack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group = pg_collection.cp
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_TND: Tensor,
        key_TND: Tensor,
        value_TND: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackParams | DecodeParams,
        **_: Any,
    ) -> Tensor:
        """[T, N, D] queries, [T, Nk, D] keys and values -> [T, N * D]."""
        params = packed_seq_params
        if isinstance(params, DecodeParams):
            return params.attend(self.layer_number, query_TND, key_TND, value_TND, self.softmax_scale)
        if self.context_group.size() > 1:
            both = torch.stack((key_TND, value_TND), dim=1)
            both = tensor_parallel.gather_from_sequence_parallel_region(both, group=self.context_group)
            key_TND, value_TND = both.unbind(1)
        assert params.plan is not None
        out = packed_attention(query_TND, key_TND, value_TND, params.plan, scale=self.softmax_scale)
        return out.flatten(1)


class LlamaAttention(SelfAttention):
    """megatron's self-attention (its projections, its names) with our forward pass.

    megatron's forward computes cosines and sines for q and for k in every layer, per segment; here they come once per
    forward pass, already gathered by position id, and one launch rotates q and k where the projection left them.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackParams | DecodeParams,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[T / sp, 1, H] -> [T / sp, 1, H]; `rotary_pos_emb` [2, T, D / 2] holds cosines and sines."""
        mixed, _bias = self.linear_qkv(hidden_states)
        rows, groups = mixed.shape[0], self.num_query_groups_per_partition
        per_group = self.num_attention_heads_per_partition // groups
        dim = self.hidden_size_per_attention_head
        # Per key/value head: its query heads, the key, the value.
        query, key, value = mixed.view(rows, groups, per_group + 2, dim).split((per_group, 1, 1), dim=2)
        cos, sin = rotary_pos_emb
        query, key = rope(query, key.squeeze(2), None, (cos, sin))
        query, value = query.flatten(1, 2), value.squeeze(2)
        if self.checkpoint_core_attention and self.training and torch.is_grad_enabled():
            out = self._checkpointed_attention_forward(query, key, value, None, packed_seq_params=packed_seq_params)
        else:
            out = self.core_attention(query, key, value, packed_seq_params=packed_seq_params)
        return self.linear_proj(out.view(rows, 1, -1))
