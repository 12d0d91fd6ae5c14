"""The resumable loader: global batches from a seeded stream of epochs, dealt to data-parallel ranks and packed."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tulu_hpc.data.packed_batch import Item, PackedBatch, pack, rows_of
from tulu_hpc.data.packing import best_fit


@dataclass
class StepData:
    """One optimizer step on one data-parallel rank.

    Attributes:
        packs: this rank's packs, at least one (an empty one when no item was left for the rank).
        item_ids: ids of the whole global batch, all ranks, in stream order.
        num_items_global: items of the whole global batch.
        step: steps taken, this one included.
    """

    packs: list[PackedBatch]
    item_ids: list[str]
    num_items_global: int
    step: int = 0


def split_group(item: Item, capacity: int, *, share: bool = True) -> list[Item]:
    """Cut a group into parts of at most `capacity` rows, each with the prompt; anything that fits is returned whole.

    Raises:
        ValueError: naming the item, if it is not a group or if one response with the prompt is already too long.
    """
    rows = rows_of(item, share)
    if rows <= capacity:
        return [item]
    where = f"item {item.id!r}" + (f" of {item.source}" if item.source else "")
    if item.kind != "group":
        raise ValueError(
            f"{where}: a {item.kind} of {rows} rows does not fit into a pack of {capacity}; "
            "raise train.pack_rows or lower data.max_length"
        )
    parts: list[list[int]] = []
    for index in range(len(item.responses)):
        if rows_of(_members(item, [index]), share) > capacity:
            raise ValueError(
                f"{where}: response {index} with its prompt has {rows_of(_members(item, [index]), share)} rows, "
                f"a pack holds {capacity}; raise train.pack_rows"
            )
        if parts and rows_of(_members(item, [*parts[-1], index]), share) <= capacity:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [_members(item, part) for part in parts]


def _members(item: Item, indices: list[int]) -> Item:
    return replace(
        item,
        responses=[item.responses[i] for i in indices],
        per_sequence={name: [column[i] for i in indices] for name, column in item.per_sequence.items()},
        per_target={name: [column[i] for i in indices] for name, column in item.per_target.items()},
    )


def pack_items(
    items: Sequence[Item], *, capacity: int, multiple: int = 1, share: bool = True, pad_id: int = 0
) -> list[PackedBatch]:
    """Pack items best-fit, in a deterministic order; a group that is too long is split over packs.

    Args:
        capacity: most rows of a pack, padding included.
        multiple, share, pad_id: as in `pack`.

    Raises:
        ValueError: naming a pair, a sequence or a single response that does not fit, or when `capacity < multiple`.
    """
    capacity = _usable(capacity, multiple)
    parts = [part for item in items for part in split_group(item, capacity, share=share)]
    bins = best_fit([rows_of(part, share) for part in parts], capacity)
    return [pack([parts[i] for i in members], share=share, multiple=multiple, pad_id=pad_id) for members in bins]


def check_sizes(items: Sequence[Item], *, capacity: int, multiple: int = 1, share: bool = True) -> None:
    """Find items that fit into no pack before a run starts, not in the middle of it.

    Raises:
        ValueError: as `pack_items`.
    """
    capacity = _usable(capacity, multiple)
    for item in items:
        split_group(item, capacity, share=share)


def _usable(capacity: int, multiple: int) -> int:
    """Rows that may hold tokens, so that a padded pack never exceeds `capacity`."""
    if capacity < multiple:
        raise ValueError(f"a pack of {capacity} rows cannot be padded to a multiple of {multiple}")
    return capacity // multiple * multiple


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Give items to ranks so that cost is balanced: costliest first, each to the rank with the least so far.

    Costs are rows or FLOPs. The fullest rank gets at most 4/3 of the best possible (Graham, 1969).
    """
    load: list[tuple[float, int]] = [(0, rank) for rank in range(ranks)]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, rank = heapq.heappop(load)
        hands[rank].append(index)
        heapq.heappush(load, (cost + costs[index], rank))
    return [sorted(hand) for hand in hands]


def tokens_of(item: Item) -> int:
    """Tokens of an item, its prompt counted once: the same for every layout, packing and kind of prefix sharing."""
    return item.prompt.numel() + sum(len(response) for response in item.responses)


class ItemLoader:
    """An endless stream of epochs (each a seeded permutation of all items), cut into global batches.

    A step takes the next items of the stream, whatever the parallel layout: `global_batch_size` of them, or as many as
    have `global_batch_tokens` together. They are dealt to the data-parallel ranks by cost and packed best-fit per rank.
    The position counts items of the stream, so a run may be resumed with another number of ranks and sees the same
    batches.

    Args:
        items: the whole data set, the same on every rank.
        global_batch_size: items per step, all ranks together.
        global_batch_tokens: instead: most tokens per step (`tokens_of`), all ranks together; at least one item is
            taken.
        cost: of an item, in any unit; what the ranks' shares are balanced by. None: its rows.
        seed: of the permutations.
        epochs: length of the run in passes over the data; the last step takes what is left.
        steps: length of the run in steps; with `epochs` given too, the shorter one counts.
        shuffle: False keeps the order of `items` in every epoch.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        pack_rows: most rows of a pack, padding included.
        multiple, share, pad_id: as in `pack`.

    Raises:
        ValueError: no items, no length, or an item that fits into no pack (naming its id).
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        global_batch_size: int | None = None,
        global_batch_tokens: int | None = None,
        seed: int,
        epochs: float | None = None,
        steps: int | None = None,
        shuffle: bool = True,
        dp_rank: int = 0,
        dp_size: int = 1,
        pack_rows: int = 4096,
        multiple: int = 1,
        share: bool = True,
        pad_id: int = 0,
        cost: Callable[[Item], float] | None = None,
    ) -> None:
        if not items:
            raise ValueError("the data set is empty: there is nothing to train on")
        sizes = {"global_batch_size": global_batch_size, "global_batch_tokens": global_batch_tokens}
        if sum(size is not None for size in sizes.values()) != 1:
            raise ValueError("give global_batch_size or global_batch_tokens, not both")
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}, need at least 1")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not in 0..{dp_size - 1}")
        if epochs is None and steps is None:
            raise ValueError("give epochs or steps")
        self._items = items
        self._batch_items, self._batch_tokens = global_batch_size, global_batch_tokens
        self._cost = cost or (lambda item: rows_of(item, share))
        self._seed = seed
        self._shuffle = shuffle
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._capacity = _usable(pack_rows, multiple)
        self._multiple, self._share, self._pad_id = multiple, share, pad_id
        check_sizes(items, capacity=pack_rows, multiple=multiple, share=share)
        self._end = math.inf if epochs is None else max(1, round(epochs * len(items)))
        self._step = 0
        self._position = 0
        self._epoch = -1
        self._order: list[int] = []
        self._num_steps = self._steps_until(self._end, math.inf if steps is None else steps)
        self._fingerprint = _fingerprint(items)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, those already taken included."""
        return self._num_steps

    @property
    def item_ids(self) -> list[str]:
        """Ids of the data set, in its order."""
        return [item.id for item in self._items]

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self._step

    def next_step(self) -> StepData:
        """The next global batch, as this rank's packs.

        Raises:
            RuntimeError: all `num_steps` steps have been taken.
        """
        if self._step >= self._num_steps:
            raise RuntimeError(f"the loader has no step beyond {self._num_steps}")
        count = self._take(self._position)
        batch = [self._items[self._index(self._position + i)] for i in range(count)]
        parts = [part for item in batch for part in split_group(item, self._capacity, share=self._share)]
        hands = deal([self._cost(part) for part in parts], self._dp_size)
        mine = [parts[i] for i in hands[self._dp_rank]]
        packs = pack_items(
            mine, capacity=self._capacity, multiple=self._multiple, share=self._share, pad_id=self._pad_id
        )
        packs = packs or [pack([], multiple=self._multiple, pad_id=self._pad_id)]
        self._position += count
        self._step += 1
        return StepData(packs=packs, item_ids=[item.id for item in batch], num_items_global=count, step=self._step)

    def __iter__(self) -> Iterator[StepData]:
        while self._step < self._num_steps:
            yield self.next_step()

    def state_dict(self) -> dict[str, Any]:
        """Plain values that `load_state_dict` continues from; the same on every rank and for every layout."""
        return {
            "step": self._step,
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_items": len(self._items),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the seed, the shuffling or the data differ from those of the saved run.
        """
        for key, mine in self.state_dict().items():
            if key not in ("step", "position") and state.get(key) != mine:
                raise ValueError(f"cannot resume the data: {key} was {state.get(key)!r}, is now {mine!r}")
        self._step, self._position = int(state["step"]), int(state["position"])

    def _take(self, position: int) -> int:
        """Items of the step that begins at `position` of the stream."""
        if self._batch_items is not None:
            return int(min(self._batch_items, self._end - position))
        assert self._batch_tokens is not None
        count = tokens = 0
        while position + count < self._end:
            tokens += tokens_of(self._items[self._index(position + count)])
            if count and tokens > self._batch_tokens:
                break
            count += 1
        return count

    def _steps_until(self, end: float, most: float) -> int:
        if self._batch_items is not None:
            return int(min(most, math.ceil(end / self._batch_items) if end < math.inf else most))
        steps = position = 0
        while position < end and steps < most:
            if end == math.inf:
                return int(most)  # nothing to count: the stream does not end
            position += self._take(position)
            steps += 1
        return steps

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._items))
        if not self._shuffle:
            return offset
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_epoch_seed(self._seed, epoch))
            self._order, self._epoch = torch.randperm(len(self._items), generator=generator).tolist(), epoch
        return self._order[offset]


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _fingerprint(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.id.encode() + b"\n")
    return digest.hexdigest()[:16]
