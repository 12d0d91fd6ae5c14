"""Key/value cache of the sequences that are decoded together.

Sequences end in the same column (they are aligned on the right), so that writing a step is a slice and what differs
between sequences is only where each begins.

Shapes: B sequences decoded together, L cache columns, T rows of a forward pass (B, or the rows of the prompts, plus
padding), N query heads, Nk key/value heads, D head dim, R = sum of the lengths of all B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tulu_hpc.kernels import AttentionPlan, packed_attention


class KVCache:
    """Keys and values of B sequences, for the layers of one rank.

    Attributes:
        columns: used columns; every sequence's last token is in column `columns - 1`.
        lengths_B: tokens of each sequence.
    """

    def __init__(
        self,
        layer_numbers: list[int],
        *,
        max_sequences: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layer = {number: index for index, number in enumerate(layer_numbers)}
        self.max_sequences, self.max_length = max_sequences, max_length
        self._heads = (kv_heads, head_dim)
        self._dtype, self.device = dtype, device
        self._memory = torch.empty(0, dtype=dtype, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget all sequences; the memory is kept."""
        self.columns = 0
        self.lengths_B = torch.empty(0, dtype=torch.int64)
        self.entries = torch.empty(0, dtype=self._dtype, device=self.device)
        self.visible: Tensor | None = None

    def start(self, lengths_B: Tensor) -> None:
        """Make room for new sequences of the given lengths (on the host).

        Raises:
            ValueError: more sequences, or a longer one, than the cache was made for.
        """
        count, longest = len(lengths_B), int(lengths_B.max())
        if count > self.max_sequences:
            raise ValueError(f"{count} sequences, but the cache holds {self.max_sequences}")
        if longest > self.max_length:
            raise ValueError(f"a prompt of {longest} tokens, but the cache holds {self.max_length} per sequence")
        kv_heads, head_dim = self._heads
        # [layer, key or value, B, Nk, L, D]
        shape = (len(self.layer), 2, count, kv_heads, self.max_length, head_dim)
        numel = int(torch.Size(shape).numel())
        if self._memory.numel() < numel:
            self._memory = torch.zeros(numel, dtype=self._dtype, device=self.device)
        self.entries = self._memory[:numel].view(shape)
        # Columns that a shorter sequence does not use are masked, and 0 x garbage must not be NaN.
        self.entries[..., :longest, :] = 0
        self.columns, self.lengths_B = longest, lengths_B.clone()
        self._set_visible()

    def _set_visible(self) -> None:
        """[B, 1, 1, L] bool: columns of each sequence; None when all begin in the same column."""
        begin_B = self.columns - self.lengths_B
        if bool((begin_B == 0).all()):
            self.visible = None
        else:
            column = torch.arange(self.max_length)
            self.visible = (column >= begin_B[:, None])[:, None, None].to(self.device)

    def advance(self) -> int:
        """Open the next column for one token per sequence; returns it.

        Raises:
            ValueError: the cache is full.
        """
        if self.columns == self.max_length:
            raise ValueError(f"the cache is full: {self.max_length} columns")
        self.columns += 1
        self.lengths_B = self.lengths_B + 1
        return self.columns - 1

    def keep(self, rows: Tensor) -> None:
        """Keep only the given sequences, in the given order (indices on the host)."""
        count = len(rows)
        kept = self.entries[..., : self.columns, :].index_select(2, rows.to(self.device))
        self.entries = self.entries[:, :, :count] if count <= self.entries.shape[2] else self.entries
        self.entries[..., : self.columns, :] = kept
        self.lengths_B = self.lengths_B[rows]
        self._set_visible()


@dataclass
class DecodeParams(PackedSeqParams):
    """A forward pass that fills or extends a key/value cache; goes to the model as `packed_seq_params`.

    Attributes:
        cache: of this rank.
        logit_rows: rows of the forward pass whose logits are wanted.
        plan: prefill only: causal attention inside each prompt of the pack.
        source_R, slot_R, column_R: prefill only: row of the pack that fills column `column_R` of sequence `slot_R`.
        column: decoding step only: the column that this step's token of each sequence fills.
    """

    qkv_format: str = "thd"
    max_seqlen_q: int = 1
    max_seqlen_kv: int = 1
    cache: KVCache | None = None
    logit_rows: Tensor | None = None
    plan: AttentionPlan | None = None
    source_R: Tensor | None = None
    slot_R: Tensor | None = None
    column_R: Tensor | None = None
    column: int = 0

    def attend(
        self, layer_number: int, query_TND: Tensor, key_TND: Tensor, value_TND: Tensor, scale: float | None
    ) -> Tensor:
        """Store the new keys and values of a layer and attend; [T, N * D]."""
        assert self.cache is not None
        keys, values = self.cache.entries[self.cache.layer[layer_number]]
        if self.plan is not None:
            assert self.source_R is not None
            at = (self.slot_R, slice(None), self.column_R)
            keys[at] = key_TND.index_select(0, self.source_R)
            values[at] = value_TND.index_select(0, self.source_R)
            return packed_attention(query_TND, key_TND, value_TND, self.plan, scale=scale).flatten(1)
        count, end = keys.shape[0], self.column + 1
        keys[:, :, self.column] = key_TND[:count]
        values[:, :, self.column] = value_TND[:count]
        visible = self.cache.visible
        out = attend_one_token(
            query_TND[:count],
            keys[:, :, :end],
            values[:, :, :end],
            None if visible is None else visible[..., :end],
            scale,
            grouped=query_TND.is_cuda,
        )
        padding = query_TND.shape[0] - count  # rows added for sequence parallelism
        return F.pad(out, (0, 0, 0, padding)) if padding else out


def attend_one_token(
    query_BND: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float | None, *, grouped: bool
) -> Tensor:
    """One query token per sequence against [B, Nk, L, D] keys and values; [B, N * D].

    Args:
        visible: bool [B, 1, 1, L], or None for all.
        grouped: hand the query heads of one key/value head over as rows of queries. On CUDA no fast kernel takes both a
            mask and shared heads; the fallback would repeat the cache per query head in fp32.
    """
    count, heads, dim = query_BND.shape
    shared = heads != keys.shape[1]
    query = query_BND.reshape(count, keys.shape[1], -1, dim) if shared and grouped else query_BND[:, :, None]
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, scale=scale, enable_gqa=shared and not grouped
    )
    return out.reshape(count, -1)
