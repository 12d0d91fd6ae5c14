"""Key/value cache of the sequences that are decoded together; sequences with the same prompt share its part of it.

Prompts and the tokens after them lie in two buffers. A prompt is stored once, whatever the number of sequences that
continue it; a sequence has a slot for its own tokens. Slots are kept dense: the live sequences are slots 0 to B - 1.

Shapes: B live sequences, P prompts in the cache, L columns, G most live sequences of one prompt, T rows of a forward
pass (B, or the rows of new prompts, plus padding), N query heads, Nk key/value heads, D head dim, R rows of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tulu_hpc.kernels import AttentionPlan, packed_attention

_COLUMN_STEP = 64


class KVCache:
    """Keys and values of the layers of one rank. Bookkeeping is on the host; memory grows with what is stored.

    Attributes:
        prompts: [layer, key or value, P, Nk, L, D].
        own: [layer, key or value, slot, Nk, L, D], a sequence's tokens after its prompt, the first in column 0.
        prompt_length: [P] tokens of each stored prompt, 0 for a free place.
        owner_B: place of the prompt of each live sequence.
        count_B: own tokens of each live sequence.
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
        self.device = device
        empty = torch.zeros(len(layer_numbers), 2, 0, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.prompts, self.own = empty, empty
        self.clear()

    def clear(self) -> None:
        """Forget everything; the memory is kept."""
        self.prompt_length: list[int] = []
        self._claims: list[int] = []  # sequences of each prompt that live or are still to come
        self.owner_B = torch.empty(0, dtype=torch.int64)
        self.count_B = torch.empty(0, dtype=torch.int64)

    def store(self, lengths: list[int], copies: list[int]) -> list[int]:
        """Places for new prompts, each kept until so many sequences that continue it have ended.

        Raises:
            ValueError: a prompt longer than the cache was made for.
        """
        if max(lengths) > self.max_length:
            raise ValueError(f"a prompt of {max(lengths)} tokens, but the cache holds {self.max_length} per sequence")
        places = [place for place, length in enumerate(self.prompt_length) if length == 0][: len(lengths)]
        places += range(len(self.prompt_length), len(self.prompt_length) + len(lengths) - len(places))
        missing = max(0, max(places) + 1 - len(self.prompt_length))
        self.prompt_length += [0] * missing
        self._claims += [0] * missing
        for place, length, count in zip(places, lengths, copies, strict=True):
            self.prompt_length[place], self._claims[place] = length, count
        self.prompts = _room(self.prompts, len(self.prompt_length), max(lengths), self.max_length)
        return places

    def open(self, places: list[int]) -> None:
        """One new sequence after each of the given prompts, behind the live ones.

        Raises:
            ValueError: more sequences than the cache was made for.
        """
        total = len(self.owner_B) + len(places)
        if total > self.max_sequences:
            raise ValueError(f"{total} sequences, but the cache holds {self.max_sequences}")
        self.owner_B = torch.cat((self.owner_B, torch.tensor(places, dtype=torch.int64)))
        self.count_B = torch.cat((self.count_B, torch.zeros(len(places), dtype=torch.int64)))

    def lengths_B(self) -> Tensor:
        """Tokens of each live sequence, its prompt included."""
        return torch.tensor(self.prompt_length, dtype=torch.int64)[self.owner_B] + self.count_B

    def advance(self) -> None:
        """Room for one more token of each live sequence.

        Raises:
            ValueError: a sequence is as long as the cache allows.
        """
        if int(self.lengths_B().max()) >= self.max_length:
            raise ValueError(f"the cache is full: {self.max_length} tokens")
        self.count_B = self.count_B + 1
        self.own = _room(self.own, len(self.count_B), int(self.count_B.max()), self.max_length)

    def keep(self, rows: Tensor) -> None:
        """Only the given sequences go on, in the given order; a slot is copied only where another one moves into it."""
        gone = torch.ones(len(self.owner_B), dtype=torch.bool)
        gone[rows] = False
        for place in self.owner_B[gone].tolist():
            self._claims[place] -= 1
            if self._claims[place] == 0:
                self.prompt_length[place] = 0
        # A new sequence has nothing to copy, and its slot may not have memory yet.
        moved = ((rows != torch.arange(len(rows))) & (self.count_B[rows] > 0)).nonzero()[:, 0]
        if len(moved):
            columns = int(self.count_B[rows[moved]].max())
            source = rows[moved].to(self.device)
            self.own[:, :, moved.to(self.device), :, :columns] = self.own[:, :, source, :, :columns]
        self.owner_B, self.count_B = self.owner_B[rows], self.count_B[rows]


def _room(buffer: Tensor, count: int, columns: int, most_columns: int) -> Tensor:
    """The buffer, or a larger one with its contents, with at least `count` places of at least `columns` columns."""
    have_count, have_columns = buffer.shape[2], buffer.shape[4]
    if have_count >= count and have_columns >= columns:
        return buffer
    if have_columns < columns:
        columns = min(max(-(-columns // _COLUMN_STEP) * _COLUMN_STEP, have_columns * 3 // 2), most_columns)
    shape = list(buffer.shape)
    shape[2], shape[4] = max(count, have_count), max(columns, have_columns)
    larger = buffer.new_zeros(shape)  # masked columns are multiplied by 0, and 0 x garbage must not be NaN
    larger[:, :, :have_count, :, :have_columns] = buffer
    return larger


@dataclass
class StepPlan:
    """Where one decoding step reads and writes; the same for all layers.

    Attributes:
        slot_B, column_B: the new tokens' place among the sequences' own tokens.
        owner_B: prompt of each sequence.
        place_B: number of each sequence among those of its prompt.
        group: G, the most sequences of one prompt.
        used_prompts, prompt_columns, own_columns: how much of the buffers is read.
        bias_BL: [B, 1, 1, L] fp32, 0 or minus infinity, L = prompt_columns + own_columns.
    """

    slot_B: Tensor
    column_B: Tensor
    owner_B: Tensor
    place_B: Tensor
    group: int
    used_prompts: int
    prompt_columns: int
    own_columns: int
    bias_BL: Tensor


def plan_step(cache: KVCache) -> StepPlan:
    """The step that appends the token for which `advance` made room."""
    owner_B, count_B = cache.owner_B, cache.count_B
    lengths = torch.tensor(cache.prompt_length)
    order = owner_B.argsort(stable=True)
    sizes = torch.bincount(owner_B)
    begins = sizes.cumsum(0) - sizes
    place_B = torch.empty_like(owner_B)
    place_B[order] = torch.arange(len(order)) - begins[owner_B[order]]
    prompt_columns, own_columns = int(lengths[owner_B].max()), int(count_B.max())
    visible = torch.cat(
        (
            torch.arange(prompt_columns) < lengths[owner_B][:, None],
            torch.arange(own_columns) < count_B[:, None],
        ),
        dim=1,
    )
    bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[:, None, None]
    device = cache.device
    return StepPlan(
        slot_B=torch.arange(len(owner_B), device=device),
        column_B=(count_B - 1).to(device),
        owner_B=owner_B.to(device),
        place_B=place_B.to(device),
        group=int(sizes.max()),
        used_prompts=len(sizes),
        prompt_columns=prompt_columns,
        own_columns=own_columns,
        bias_BL=bias.to(device),
    )


@dataclass
class DecodeParams(PackedSeqParams):
    """A forward pass that fills or extends a key/value cache; goes to the model as `packed_seq_params`.

    Attributes:
        cache: of this rank.
        logit_rows: rows of the forward pass whose logits are wanted.
        plan: prompts only: causal attention inside each prompt of the pack.
        place_R, column_R: prompts only: row r of the pack fills column `column_R[r]` of prompt `place_R[r]`.
        step: decoding step only.
    """

    qkv_format: str = "thd"
    max_seqlen_q: int = 1
    max_seqlen_kv: int = 1
    cache: KVCache | None = None
    logit_rows: Tensor | None = None
    plan: AttentionPlan | None = None
    place_R: Tensor | None = None
    column_R: Tensor | None = None
    step: StepPlan | None = None

    def attend(
        self, layer_number: int, query_TND: Tensor, key_TND: Tensor, value_TND: Tensor, scale: float | None
    ) -> Tensor:
        """Store the new keys and values of a layer and attend; [T, N * D]."""
        assert self.cache is not None
        layer = self.cache.layer[layer_number]
        if self.plan is not None:
            assert self.place_R is not None
            rows = len(self.place_R)
            keys, values = self.cache.prompts[layer]
            at = (self.place_R, slice(None), self.column_R)
            keys[at] = key_TND[:rows]
            values[at] = value_TND[:rows]
            return packed_attention(query_TND, key_TND, value_TND, self.plan, scale=scale).flatten(1)
        step = self.step
        assert step is not None
        count = len(step.slot_B)
        keys, values = self.cache.own[layer]
        new = (step.slot_B, slice(None), step.column_B)
        keys[new] = key_TND[:count]
        values[new] = value_TND[:count]
        out = attend_one_token(query_TND[:count], self.cache.prompts[layer], self.cache.own[layer], step, scale)
        padding = query_TND.shape[0] - count  # rows added for sequence parallelism
        return F.pad(out, (0, 0, 0, padding)) if padding else out


def attend_one_token(query_BND: Tensor, prompts: Tensor, own: Tensor, step: StepPlan, scale: float | None) -> Tensor:
    """One query token per sequence against its prompt and its own tokens; [B, N * D].

    All sequences of a prompt are rows of one product with the prompt's keys, which are read once for all of them. The
    scores of both parts go through one softmax in fp32.

    Args:
        prompts, own: [key or value, place, Nk, L, D].
    """
    count, heads, dim = query_BND.shape
    kv_heads = own.shape[2]
    scale = dim**-0.5 if scale is None else scale
    query = query_BND.reshape(count, kv_heads, -1, dim)  # [B, Nk, N / Nk, D]
    prompt_keys, prompt_values = prompts[:, : step.used_prompts, :, : step.prompt_columns]
    own_keys, own_values = own[:, :count, :, : step.own_columns]
    scores = torch.cat(
        (
            _ungrouped(_product(_grouped(query, step), prompt_keys.transpose(-1, -2)), step),
            _product(query, own_keys.transpose(-1, -2)),
        ),
        dim=-1,
    )
    weights = torch.softmax(scores * scale + step.bias_BL, dim=-1).to(query_BND.dtype)
    on_prompt, on_own = weights.split((step.prompt_columns, step.own_columns), dim=-1)
    out = _ungrouped(_product(_grouped(on_prompt, step), prompt_values), step) + _product(on_own, own_values)
    return out.to(query_BND.dtype).reshape(count, heads * dim)


def _grouped(rows: Tensor, step: StepPlan) -> Tensor:
    """[B, Nk, r, X] to [P, Nk, G * r, X]: the sequences of a prompt under one another, absent ones 0."""
    _, kv_heads, repeats, width = rows.shape
    grouped = rows.new_zeros(step.used_prompts, step.group, kv_heads, repeats, width)
    grouped[step.owner_B, step.place_B] = rows
    return grouped.transpose(1, 2).reshape(step.used_prompts, kv_heads, step.group * repeats, width)


def _ungrouped(grouped: Tensor, step: StepPlan) -> Tensor:
    """The inverse of `_grouped`."""
    places, kv_heads, rows, width = grouped.shape
    apart = grouped.view(places, kv_heads, step.group, rows // step.group, width).transpose(1, 2)
    return apart[step.owner_B, step.place_B]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product, summed and returned in fp32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        flat = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return flat.view(*left.shape[:2], *flat.shape[1:])
    return left.float() @ right.float()
