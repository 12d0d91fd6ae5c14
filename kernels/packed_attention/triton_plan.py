"""Tables of the Triton backend: which tiles exist and what each of them visits. Host code, once per pack.

Shapes: B query tiles, C key parts, I visits, E split key tiles, T query rows, M key rows.

Rows are rows of the pack for keys and rows of q for queries; `shift` is a query's pack row minus its row in q. No tile
crosses a segment, so the bits of a group's results do not depend on what else is in the pack.
"""

import itertools
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, Entry

# A prompt's key tile is visited by all of its responses. Its queries are divided over up to SPLIT_MOST programs of at
# least SPLIT_ROWS rows, as long as the prompt's tiles and heads are fewer than SPLIT_PROGRAMS.
SPLIT_ROWS = 4096
SPLIT_MOST = 8
SPLIT_PROGRAMS = 256
# Added to a row of q it is beyond every key, and no overflow.
EVERY = 1 << 30
Visit = tuple[int, int, int]


class Tile(NamedTuple):
    """Rows of queries and keys in a tile, and how it is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels; split_key_pass: gradients of keys and of values in a launch each, which repeats
    one product of four but needs half the accumulators."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile
    split_key_pass: bool = False

    @property
    def key_passes(self) -> list[dict[str, bool]]:
        """The constants OF_KEYS and OF_VALUES of each launch of the key gradient kernel."""
        if self.split_key_pass:
            return [{"OF_KEYS": True, "OF_VALUES": False}, {"OF_KEYS": False, "OF_VALUES": True}]
        return [{"OF_KEYS": True, "OF_VALUES": True}]


def tiles(head_dim: int, dtype: torch.dtype, permuted: bool) -> Tiles:
    """Sizes whose registers do not spill with bf16 and fp16, up to what `ahead_of_time.spills_allowed` lists.

    permuted: key rows are looked up in a table, which costs registers.
    """
    if dtype == torch.float32:  # products without tensor cores: each thread holds whole rows of both operands
        small, large = Tile(16, 16, 8, 1), Tile(32, 32, 8, 1)
        if head_dim > 128:
            return Tiles(small, small, small, True)
        return Tiles(large, small, small) if head_dim > 64 else Tiles(large, large, large)
    if head_dim > 128:
        return Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), True)
    if head_dim > 64:
        return Tiles(Tile(64 if permuted else 128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2))
    return Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2))


@dataclass
class Tables:
    """What the kernels read; int32 on the plan's device.

    Attributes:
        forward, query_gradient: [B, 6] query_start, query_stop, prefix_start, prefix_stop, key_start, shift of each
            query tile, most work first. key_start is that of the tile's segment.
        parts: [C, 5] key_start, key_stop, first and last + 1 of `visits`, and the slot of the partial result, -1:
            none, the part is the whole.
        visits: [I, 3] query_start, query_stop, shift; a shift of EVERY: the queries see all keys of the tile.
        splits: [E, 4] key_start, key_stop and the slots, first and last + 1, of a split key tile.
        slots: partial results in all.
        key_rows: [M] row of k and v of a pack row; None: the same.
    """

    forward: Tensor
    query_gradient: Tensor
    parts: Tensor
    visits: Tensor
    splits: Tensor
    slots: int
    key_rows: Tensor | None


def tables(plan: "AttentionPlan", sizes: Tiles) -> Tables:
    """The tables for these tiles, built at the first call and kept on the plan."""
    if sizes not in plan.triton_tables:
        plan.triton_tables[sizes] = _build(plan, sizes)
    return plan.triton_tables[sizes]


def _build(plan: "AttentionPlan", sizes: Tiles) -> Tables:
    parts, visits, splits, slots = _key_parts(plan, sizes.key_gradient)
    key_rows = None
    if plan.key_order is not None:
        key_rows = torch.empty(plan.num_keys, dtype=torch.int32)
        key_rows[plan.key_order] = torch.arange(plan.num_keys, dtype=torch.int32)
        key_rows = key_rows.to(plan.device)
    put = lambda rows, columns: torch.tensor(rows, dtype=torch.int32).reshape(-1, columns).to(plan.device)  # noqa: E731
    return Tables(
        forward=put(_query_tiles(plan.entries, sizes.forward.queries), 6),
        query_gradient=put(_query_tiles(plan.entries, sizes.query_gradient.queries), 6),
        parts=put(parts, 5),
        visits=put(visits, 3),
        splits=put(splits, 4),
        slots=slots,
        key_rows=key_rows,
    )


def _query_tiles(entries: "list[Entry]", size: int) -> list[tuple[int, ...]]:
    found = []
    for e in entries:
        shift = e.key_stop - e.query_stop
        for start in range(e.query_start, e.query_stop, size):
            stop = min(start + size, e.query_stop)
            work = e.prefix_stop - e.prefix_start + stop + shift - e.key_start
            found.append((work, (start, stop, e.prefix_start, e.prefix_stop, e.key_start, shift)))
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def _key_parts(
    plan: "AttentionPlan", tile: Tile
) -> tuple[list[tuple[int, ...]], list[Visit], list[tuple[int, ...]], int]:
    cuts = {0, plan.num_keys}
    own: dict[int, list[Entry]] = {}
    shared: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for e in plan.entries:
        cuts.update((e.key_start, e.key_stop))
        own.setdefault(e.key_start, []).append(e)
        if e.prefix_start < e.prefix_stop:
            cuts.update((e.prefix_start, e.prefix_stop))
            runs = shared.setdefault((e.prefix_start, e.prefix_stop), [])
            if runs and runs[-1][1] == e.query_start:  # adjacent responses of a prompt are one run of full tiles
                runs[-1] = (runs[-1][0], e.query_stop)
            else:
                runs.append((e.query_start, e.query_stop))
    key_tiles = [
        (start, min(start + tile.keys, b))
        for a, b in itertools.pairwise(sorted(cuts))
        for start in range(a, b, tile.keys)
    ]
    starts = [start for start, _ in key_tiles]
    first: list[list[Visit]] = [[] for _ in key_tiles]
    for of_segment in own.values():
        for e in of_segment:
            shift, position = e.key_stop - e.query_stop, e.key_stop - (e.query_stop - e.query_start)
            for i in range(bisect_left(starts, e.key_start), bisect_left(starts, e.key_stop)):
                query = max(position, starts[i]) - shift
                first[i].append((query, e.query_stop, shift))
    more: list[list[list[Visit]]] = [[] for _ in key_tiles]  # further parts of the tile
    for (a, b), runs in shared.items():
        covered = range(bisect_left(starts, a), bisect_left(starts, b))
        rows = sum(stop - start for start, stop in runs)
        programs = len(covered) * plan.kv_heads
        count = max(1, min(SPLIT_MOST, rows // SPLIT_ROWS, SPLIT_PROGRAMS // programs))
        shares = _shares(runs, -(-rows // count))
        for i in covered:
            first[i].extend(shares[0])
            more[i].extend(shares[1:])
    return _flatten(key_tiles, first, more)


def _shares(runs: list[tuple[int, int]], rows: int) -> list[list[Visit]]:
    """The runs cut into lists of at most `rows` rows each."""
    found: list[list[Visit]] = [[]]
    room = rows
    for start, stop in runs:
        while start < stop:
            if room == 0:
                found.append([])
                room = rows
            end = min(stop, start + room)
            found[-1].append((start, end, EVERY))
            room -= end - start
            start = end
    return found


def _flatten(
    key_tiles: list[tuple[int, int]], first: list[list[Visit]], more: list[list[list[Visit]]]
) -> tuple[list[tuple[int, ...]], list[Visit], list[tuple[int, ...]], int]:
    parts: list[tuple[int, tuple[int, ...]]] = []
    visits: list[Visit] = []
    splits: list[tuple[int, ...]] = []
    slots = 0
    for (start, stop), whole, rest in zip(key_tiles, first, more):
        if rest:
            splits.append((start, stop, slots, slots + 1 + len(rest)))
        for number, part in enumerate([whole, *rest]):
            low = len(visits)
            visits += part
            work = sum(b - a for a, b, _ in part)
            parts.append((work, (start, stop, low, len(visits), slots + number if rest else -1)))
        slots += 1 + len(rest) if rest else 0
    return [row for _, row in sorted(parts, key=lambda pair: -pair[0])], visits, splits, slots
