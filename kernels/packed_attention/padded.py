"""Batches of entries of similar length for the CPU library, which takes dense [B, N, L, D] tensors.

Padding stands at the end of an entry: under a causal mask no real query sees a padded key, and padded queries get a
zero gradient, so the padding changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries share a batch when the shortest has at least this share of the longest's queries.
_SIMILAR = 0.85
# Entries with at least this many queries go alone: no copies of their rows.
_LONG = 1024
# The library computes all scores of up to 512 keys before it applies the causal mask. So segments are cut into entries
# of this many queries and more, each with the keys that its last query sees.
_BLOCK = 64


@dataclass
class PaddedBatch:
    """B entries of up to Lq queries on up to Lk keys."""

    batch: int
    query_length: int
    key_length: int
    query_rows: Tensor | slice  # [B Lq] rows of q; padding repeats the entry's last row
    key_rows: Tensor | slice  # [B Lk] rows of k and v, likewise
    place: Tensor | None  # flat positions of the real queries in [B Lq]; None: all
    real_rows: Tensor | slice  # rows of q of the real queries
    causal: bool  # top-left causal, which is right when every entry has as many keys as queries
    mask: Tensor | None  # else [Lq, Lk] fp32 added to the scores: 0 or minus infinity


def pad_entries(
    query_start: int,
    query_lengths: list[int],
    key_start: int,
    key_index: Tensor | None,
    key_lengths: list[int],
    causal: bool,
) -> list[PaddedBatch]:
    """Groups the entries of one variable-length call; see `plan.VarlenCall` for the arguments."""
    entries, q, k = [], query_start, 0
    for queries, keys in zip(query_lengths, key_lengths):
        # Entries share a batch only when they see equally many keys beyond their own (causal), or keys at all (dense).
        for first, stop in _blocks(queries) if causal else ((0, queries),):
            entries.append((keys - queries + first if causal else keys, stop - first, q + first, k))
        q, k = q + queries, k + keys
    batches: list[PaddedBatch] = []
    group: list[tuple[int, int, int, int]] = []
    for entry in sorted(entries, key=lambda e: (e[0], -e[1], e[2])):
        if group and (entry[0] != group[0][0] or entry[1] < _SIMILAR * group[0][1] or entry[1] >= _LONG):
            batches.append(_batch(group, key_start, key_index, causal))
            group = []
        group.append(entry)
    if group:
        batches.append(_batch(group, key_start, key_index, causal))
    return batches


def _blocks(queries: int) -> Iterator[tuple[int, int]]:
    """Ranges of _BLOCK queries; the last has the rest too."""
    last = max(0, queries // _BLOCK - 1)
    for number in range(last + 1):
        yield number * _BLOCK, queries if number == last else (number + 1) * _BLOCK


def _batch(
    group: list[tuple[int, int, int, int]], key_start: int, key_index: Tensor | None, causal: bool
) -> PaddedBatch:
    left, longest = group[0][0], group[0][1]
    key_length = left + longest if causal else left
    query_first = torch.tensor([e[2] for e in group])[:, None]
    query_last = torch.tensor([e[2] + e[1] - 1 for e in group])[:, None]
    queries = torch.arange(longest)
    query_rows = (query_first + queries).minimum(query_last).flatten()
    key_first = torch.tensor([e[3] for e in group])[:, None]
    key_last = torch.tensor([e[3] + (left + e[1] if causal else left) - 1 for e in group])[:, None]
    key_rows = (key_first + torch.arange(key_length)).minimum(key_last).flatten()
    key_rows = key_rows + key_start if key_index is None else key_index[key_rows]
    real = (query_first + queries <= query_last).flatten()
    padded = not bool(real.all())
    masked = causal and left > 0
    return PaddedBatch(
        batch=len(group),
        query_length=longest,
        key_length=key_length,
        query_rows=_as_slice(query_rows),
        key_rows=_as_slice(key_rows),
        place=real.nonzero()[:, 0] if padded else None,
        real_rows=query_rows[real] if padded else _as_slice(query_rows),
        causal=causal and not masked,
        mask=torch.full((longest, key_length), -torch.inf).triu(left + 1) if masked else None,
    )


def _as_slice(rows: Tensor) -> Tensor | slice:
    first = int(rows[0])
    return slice(first, first + len(rows)) if torch.equal(rows, torch.arange(first, first + len(rows))) else rows
