"""The one batch format of every trainer: a token-flat pack in three tables.

Shapes: T rows (tokens the network reads), S segments, K targets (tokens to predict), Q sequences, P pairs.

Rows of a pack, in this order, so that attention and context-parallel ranges are plain slices:

    [ prompt_1 | ... | prompt_n | ordinary sequences | padding | responses of 1 | ... | responses of n ]

A row is a token the network reads, a target is a token it predicts. The last token of a sequence is only a target, one
prompt row may feed the first target of several responses, and tokens without weight are in no table at all: they never
reach the LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

ItemKind = Literal["sequence", "pair", "group"]

SEQUENCE, CHOSEN, REJECTED, MEMBER = 0, 1, 2, 3
RESERVED_COLUMNS = ("item", "kind")


def _no_tokens() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class TokenSequence:
    """Tokens and which of them are trained.

    Attributes:
        tokens: [n] int64.
        mask: [n] bool, True where the token is a target; None: all of them.
    """

    tokens: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 1:
            raise ValueError(f"tokens must be one-dimensional, got shape {tuple(self.tokens.shape)}")
        if self.mask is not None and self.mask.shape != self.tokens.shape:
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}, tokens {tuple(self.tokens.shape)}")

    def __len__(self) -> int:
        return self.tokens.numel()


@dataclass
class Item:
    """One training item: an ordinary sequence, a DPO pair (chosen, rejected) or a GRPO group.

    Attributes:
        kind: "sequence" (one response), "pair" (chosen, then rejected) or "group" (one or more responses).
        responses: each at least one token long.
        prompt: [P] int64 tokens all responses continue; never trained; may be empty for a sequence.
        per_sequence: columns of one number per response, such as `advantage`.
        per_target: columns of one tensor [len(response)] per response, such as `behaviour_logprobs`.
        id: content hash of the record.
        source: name of the data set it came from.
    """

    kind: ItemKind
    responses: list[TokenSequence]
    prompt: Tensor = field(default_factory=_no_tokens)
    per_sequence: dict[str, list[float]] = field(default_factory=dict)
    per_target: dict[str, list[Tensor]] = field(default_factory=dict)
    id: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        wanted = {"sequence": "exactly one response", "pair": "two responses", "group": "at least one response"}
        if self.kind not in wanted:
            raise ValueError(f"item {self.id!r}: kind {self.kind!r} is not one of {', '.join(wanted)}")
        count = len(self.responses)
        if {"sequence": count != 1, "pair": count != 2, "group": count < 1}[self.kind]:
            raise ValueError(f"item {self.id!r}: a {self.kind} has {wanted[self.kind]}, got {count}")
        if any(len(response) == 0 for response in self.responses):
            raise ValueError(f"item {self.id!r}: a response is empty")
        sizes = {name: len(column) for name, column in self.per_sequence.items()}
        sizes |= {name: len(column) for name, column in self.per_target.items()}
        for name, size in sizes.items():
            if name in RESERVED_COLUMNS:
                raise ValueError(f"item {self.id!r}: the column name {name!r} is reserved")
            if size != count:
                raise ValueError(f"item {self.id!r}: column {name!r} has {size} entries for {count} responses")
        for name, tensors in self.per_target.items():
            for tensor, response in zip(tensors, self.responses, strict=True):
                if tensor.shape != response.tokens.shape:
                    raise ValueError(
                        f"item {self.id!r}: column {name!r} has {tuple(tensor.shape)} values for {len(response)} tokens"
                    )


@dataclass
class PackedBatch:
    """One pack. Row, target and segment indices are of the whole pack, whatever the parallel layout.

    Attributes:
        tokens_T: int64.
        position_ids_T: int64; a response that shares its prompt continues at len(prompt).
        cu_seqlens: [S+1] int32; segments tile the rows and each is causal in itself.
        prefix_S2: int32; rows prefix[s,0]:prefix[s,1] are also seen by all of segment s (equal: none).
        hidden_row_K: int64, the row whose hidden state predicts the target; not unique.
        target_K: int64 token ids; K is sorted by (sequence, position).
        sequence_id_K: int64 in 0..Q-1, non-decreasing.
        per_target: columns [K]; NaN for items that lack the column.
        per_sequence: columns [Q]; always `item` (index of the item in the pack) and `kind` (0 sequence, 1 chosen,
            2 rejected, 3 group member), both int64; the others float32, NaN for items that lack the column.
        item_ids, sources: one per item.
        per_row: columns [T] that a stage adds after packing.
    """

    tokens_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    prefix_S2: Tensor
    hidden_row_K: Tensor
    target_K: Tensor
    sequence_id_K: Tensor
    per_target: dict[str, Tensor]
    per_sequence: dict[str, Tensor]
    item_ids: list[str]
    sources: list[str]
    per_row: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.tokens_T.numel()

    @property
    def num_targets(self) -> int:
        return self.target_K.numel()

    @property
    def num_sequences(self) -> int:
        return self.per_sequence["item"].numel()

    @property
    def pairs_P2(self) -> Tensor:
        """[P, 2] int64: sequence ids of the chosen and the rejected response of each pair, in item order."""
        kind_Q = self.per_sequence["kind"]
        return torch.stack(((kind_Q == CHOSEN).nonzero()[:, 0], (kind_Q == REJECTED).nonzero()[:, 0]), dim=1)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same pack with every tensor on `device`."""
        return replace(
            self,
            tokens_T=self.tokens_T.to(device),
            position_ids_T=self.position_ids_T.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            prefix_S2=self.prefix_S2.to(device),
            hidden_row_K=self.hidden_row_K.to(device),
            target_K=self.target_K.to(device),
            sequence_id_K=self.sequence_id_K.to(device),
            per_target={name: column.to(device) for name, column in self.per_target.items()},
            per_sequence={name: column.to(device) for name, column in self.per_sequence.items()},
            per_row={name: column.to(device) for name, column in self.per_row.items()},
        )


def shares_prompt(item: Item, share: bool) -> bool:
    """A prompt is a segment of its own when at least two responses read it."""
    return share and item.prompt.numel() > 0 and len(item.responses) > 1


def rows_of(item: Item, share: bool = True, drop_last: bool = True) -> int:
    """Rows that `item` takes in a pack, padding aside."""
    responses = sum(len(response) for response in item.responses)
    prompts = item.prompt.numel() * (1 if shares_prompt(item, share) else len(item.responses))
    return prompts + responses - (len(item.responses) if drop_last else 0)


def pack(
    items: Sequence[Item], *, share: bool = True, multiple: int = 1, pad_id: int = 0, drop_last: bool = True
) -> PackedBatch:
    """Lay items out as one pack.

    Args:
        items: any mix of kinds; none gives a pack of padding rows and no targets.
        share: hold the prompt of a pair or group once; False repeats it: the same targets in the same order.
        multiple: pad the rows to a multiple of it (tensor x context parallel size); padding is a segment of its own.
        pad_id: token of padding rows.
        drop_last: leave out the last token of each sequence, which nothing reads (False for reward and value heads).
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, need at least 1")
    # The segments of each section, as (tokens, length, first position, index of the prompt segment or -1).
    prompts: list[tuple[Tensor, int, int, int]] = []
    ordinary: list[tuple[Tensor, int, int, int]] = []
    shared: list[tuple[Tensor, int, int, int]] = []
    place: list[tuple[bool, int]] = []  # per sequence: in `shared`?, its index in that section
    prompt_len: list[int] = []  # per sequence
    owner: list[int] = []  # per sequence: index of its prompt segment
    dropped = 1 if drop_last else 0
    for item in items:
        shares, size = shares_prompt(item, share), item.prompt.numel()
        if shares:
            prompts.append((item.prompt, size, 0, -1))
        for response in item.responses:
            prompt_len.append(size)
            owner.append(len(prompts) - 1 if shares else -1)
            place.append((shares, len(shared) if shares else len(ordinary)))
            if shares:
                shared.append((response.tokens, len(response) - dropped, size, len(prompts) - 1))
            else:
                tokens = torch.cat((item.prompt, response.tokens)) if size else response.tokens
                ordinary.append((tokens, tokens.numel() - dropped, 0, -1))
    rows = sum(segment[1] for section in (prompts, ordinary, shared) for segment in section)
    padding = -rows % multiple if rows else multiple
    pads = [(torch.full((padding,), pad_id, dtype=torch.int64), padding, 0, -1)] if padding else []
    segments = prompts + ordinary + pads + shared

    length_S = torch.tensor([segment[1] for segment in segments], dtype=torch.int64)
    start = [0, *accumulate(segment[1] for segment in segments)]
    start_S = torch.tensor(start[:-1], dtype=torch.int64)
    first_position_S = torch.tensor([segment[2] for segment in segments], dtype=torch.int64)
    within_T = torch.arange(start[-1]) - start_S.repeat_interleave(length_S)
    prefix_S2 = torch.tensor([(start[o], start[o + 1]) if o >= 0 else (0, 0) for *_, o in segments], dtype=torch.int32)
    present_S = length_S > 0  # the only token of a one-token response is a target, not a row

    first_response = len(prompts) + len(ordinary) + len(pads)
    responses = [response for item in items for response in item.responses]
    size_Q = torch.tensor([len(response) for response in responses], dtype=torch.int64)
    # Token t of a sequence is predicted by row base + t - 1; token 0 by the last prompt row, or by nothing (-1).
    base, first = [], []
    for (is_shared, index), prompt, own in zip(place, prompt_len, owner, strict=True):
        begin = start[first_response + index] if is_shared else start[len(prompts) + index] + prompt
        base.append(begin)
        first.append(start[own + 1] - 1 if is_shared else (begin - 1 if prompt else -1))
    total = int(size_Q.sum())
    sequence_R = torch.arange(len(responses)).repeat_interleave(size_Q)
    token_R = torch.cat([response.tokens for response in responses]) if responses else _no_tokens()
    offset_R = torch.arange(total) - (size_Q.cumsum(0) - size_Q).repeat_interleave(size_Q)
    row_R = torch.tensor(base, dtype=torch.int64).repeat_interleave(size_Q) + offset_R - 1
    first_R = torch.tensor(first, dtype=torch.int64).repeat_interleave(size_Q)
    row_R = torch.where(offset_R == 0, first_R, row_R)
    keep_R = row_R >= 0
    if any(response.mask is not None for response in responses):
        keep_R &= torch.cat(
            [torch.ones(len(r), dtype=torch.bool) if r.mask is None else r.mask.bool() for r in responses]
        )

    return PackedBatch(
        tokens_T=torch.cat([tokens[:length] for tokens, length, *_ in segments]).to(torch.int64),
        position_ids_T=first_position_S.repeat_interleave(length_S) + within_T,
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), length_S[present_S].cumsum(0))).to(torch.int32),
        prefix_S2=prefix_S2[present_S],
        hidden_row_K=row_R[keep_R],
        target_K=token_R[keep_R].to(torch.int64),
        sequence_id_K=sequence_R[keep_R],
        per_target=_target_columns(items, keep_R),
        per_sequence=_sequence_columns(items),
        item_ids=[item.id for item in items],
        sources=[item.source for item in items],
    )


def _target_columns(items: Sequence[Item], keep_R: Tensor) -> dict[str, Tensor]:
    """Columns [K]: the tensors of all responses in a row, at the kept tokens."""
    columns = {}
    for name in dict.fromkeys(name for item in items for name in item.per_target):
        parts = []
        for item in items:
            missing = [torch.full((len(response),), torch.nan) for response in item.responses]
            parts.extend(item.per_target.get(name, missing))
        columns[name] = torch.cat(parts)[keep_R]
    return columns


def _sequence_columns(items: Sequence[Item]) -> dict[str, Tensor]:
    """Columns [Q], `item` and `kind` first."""
    kinds: dict[ItemKind, tuple[int, ...]] = {"sequence": (SEQUENCE,), "pair": (CHOSEN, REJECTED)}
    owner = [index for index, item in enumerate(items) for _ in item.responses]
    kind = [k for item in items for k in kinds.get(item.kind, (MEMBER,) * len(item.responses))]
    columns = {"item": torch.tensor(owner, dtype=torch.int64), "kind": torch.tensor(kind, dtype=torch.int64)}
    for name in dict.fromkeys(name for item in items for name in item.per_sequence):
        values = [v for item in items for v in item.per_sequence.get(name, [float("nan")] * len(item.responses))]
        columns[name] = torch.tensor(values, dtype=torch.float32)
    return columns
