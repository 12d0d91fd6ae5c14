"""One number per answer of an item, by forward passes alone: sums of log-probs, or scores of a reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash
from torch import Tensor

from tulu_hpc.data.loader import deal, pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, rows_of
from tulu_hpc.objectives.terms import sequence_sums
from tulu_hpc.training.runner import Runner, row_multiple

Sums = tuple[float, ...]  # one per answer: (chosen, rejected) of a pair


@dataclass(frozen=True)
class PackOptions:
    """How items are packed for the forward passes (as in training)."""

    pack_rows: int
    share: bool = True
    pad_id: int = 0


def item_key(item: Item) -> str:
    """Content hash of an item: prompt, responses and which of their tokens are scored."""
    digest = xxhash.xxh3_128()
    for part in (item.prompt, *(response.tokens for response in item.responses)):
        _update(digest, part)
    for response in item.responses:
        if response.mask is not None:
            _update(digest, response.mask.bool())
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tensor.numel()};".encode())
    digest.update(tensor.contiguous().numpy().tobytes())


def compute_sums(
    keyed: dict[str, Item],
    runner: Runner,
    options: PackOptions,
    read: Callable[[Sequence[PackedBatch]], list[Tensor]] | None = None,
) -> dict[str, Sums]:
    """Sums of the log-probs of each response of each item, on every rank; data-parallel ranks share the work.

    Args:
        read: what is summed over the targets of a response instead, e.g. `runner.values`.
    """
    groups = runner.groups
    # The key travels as the item's id, so that it can be read off the packs.
    items = [replace(item, id=key, per_sequence={}, per_target={}) for key, item in keyed.items()]
    share = deal([rows_of(item, options.share) for item in items], groups.dp_size)[groups.dp_rank]
    packs = pack_items(
        [items[i] for i in share],
        capacity=options.pack_rows,
        multiple=row_multiple(groups.layout, runner.split),
        share=options.share,
        pad_id=options.pad_id,
    )
    mine: dict[str, Sums] = {}
    for pack, values_K in zip(packs, (read or runner.logprobs)(packs), strict=True):
        mine.update(_sums_of_items(pack, values_K))
    return {key: sums for part in groups.all_gather_object(mine) for key, sums in part.items()}


def _sums_of_items(pack: PackedBatch, values_K: Tensor) -> Iterable[tuple[str, Sums]]:
    sums_Q = sequence_sums(values_K, pack.sequence_id_K.to(values_K.device), pack.num_sequences).tolist()
    answers: list[list[float]] = [[] for _ in pack.item_ids]
    for item, value in zip(pack.per_sequence["item"].tolist(), sums_Q, strict=True):
        answers[item].append(value)
    return zip(pack.item_ids, map(tuple, answers), strict=True)
