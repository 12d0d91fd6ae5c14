from __future__ import annotations

import math
from itertools import pairwise, product
from unittest.mock import Mock

import pytest
import torch

from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, pack, rows_of
from tulu_hpc.kernels import plan_attention
from tulu_hpc.parallel.context import rank_batch, split_rows
from tulu_hpc.parallel.layout import Groups, Layout

CPU = torch.device("cpu")


def batch(kinds: str, seed: int = 0, multiple: int = 64, scale: int = 1) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> torch.Tensor:
        count = int(torch.randint(low * scale, high * scale, (), generator=generator))
        return torch.randint(1, 99, (count,), generator=generator)

    items = []
    for kind in kinds:
        if kind == "s":
            items.append(Item("sequence", [TokenSequence(tokens(5, 80))]))
        else:
            count = 2 if kind == "p" else 4
            name = "pair" if kind == "p" else "group"
            items.append(
                Item(name, [TokenSequence(tokens(2, 30)) for _ in range(count)], prompt=tokens(5, 60))  # type: ignore[arg-type]
            )
    return pack(items, multiple=multiple)


def place(cp: int, rank: int, sequence: bool = False) -> Groups:
    """Groups without processes: rank_batch only looks at numbers."""
    layout = Layout(context=cp, tensor=2 if sequence else 1, sequence=sequence)
    return Groups(layout, Mock(), rank, cp, 0, 0, rank, 0, 1)


def pairs(packed: PackedBatch, ranges: list[tuple[int, int]]) -> int:
    """(query, key) pairs of some rows, counted row by row from the definition."""
    cu = packed.cu_seqlens.tolist()
    prefix = (packed.prefix_S2[:, 1] - packed.prefix_S2[:, 0]).tolist()
    seen = [row - a + 1 + extra for (a, b), extra in zip(pairwise(cu), prefix, strict=True) for row in range(a, b)]
    return sum(sum(seen[a:b]) for a, b in ranges)


@pytest.mark.parametrize("kind", ["greedy", "contiguous", "zigzag"])
@pytest.mark.parametrize("cp", [1, 2, 4, 8])
def test_every_row_has_one_owner_and_ranks_are_equal(kind: str, cp: int) -> None:
    packed = batch("spgsp")
    ranges = split_rows(packed, cp, kind)  # type: ignore[arg-type]
    assert [sum(b - a for a, b in mine) for mine in ranges] == [packed.num_rows // cp] * cp
    owned = sorted(row for mine in ranges for a, b in mine for row in range(a, b))
    assert owned == list(range(packed.num_rows))
    assert all(a < b <= c < d for mine in ranges for (a, b), (c, d) in pairwise(mine))


@pytest.mark.parametrize("kinds", ["s", "ppp", "gg", "sg", "spgspg"])
def test_greedy_balances_attention(kinds: str) -> None:
    packed = batch(kinds, scale=8, multiple=4)  # not a multiple of the number of chunks
    for cp in (2, 4):
        loads = [pairs(packed, mine) for mine in split_rows(packed, cp, "greedy")]
        contiguous = [pairs(packed, mine) for mine in split_rows(packed, cp, "contiguous")]
        assert max(loads) / (sum(loads) / cp) < 1.1
        assert max(loads) <= max(contiguous) * 1.02


def long_tailed(kind: str, rows: int, seed: int) -> PackedBatch:
    """A full pack of items with log-normal lengths (sigma 1.2), one of them up to half of the pack."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(median: int) -> torch.Tensor:
        size = median * math.exp(1.2 * float(torch.randn((), generator=generator)))
        return torch.ones(min(max(int(size), 2), rows // 2), dtype=torch.int64)

    items: list[Item] = []
    while sum(map(rows_of, items)) < rows:
        if kind == "long and short":
            first = torch.ones(rows // 2, dtype=torch.int64)
            items.append(Item("sequence", [TokenSequence(tokens(100) if items else first)]))
        elif kind == "sequence":
            items.append(Item(kind, [TokenSequence(tokens(300))]))
        else:
            count = 2 if kind == "pair" else 8
            name = "pair" if kind == "pair" else "group"
            items.append(Item(name, [TokenSequence(tokens(200)) for _ in range(count)], prompt=tokens(300)))  # type: ignore[arg-type]
    return pack(items, multiple=64)


@pytest.mark.parametrize("kind", ["sequence", "long and short", "pair", "group"])
def test_greedy_gives_every_rank_the_same_attention_work(kind: str) -> None:
    """Of long-tailed packs, prefixes included: max / mean of what the kernel is planned to do, at most 1.05."""
    options = {"heads": 2, "kv_heads": 1, "head_dim": 8, "device": CPU}
    worst = {"greedy": 0.0, "contiguous": 0.0}
    for rows, seed, cp in product((1024, 4096), range(4), (2, 4, 8)):
        packed = long_tailed(kind, rows, seed)
        for split in worst:
            plans = [rank_batch(packed, place(cp, r), split=split, **options).params.plan for r in range(cp)]  # type: ignore[arg-type]
            flops = [plan.attention_pairs for plan in plans if plan is not None]
            assert len(flops) == cp
            worst[split] = max(worst[split], max(flops) * cp / sum(flops))
    assert worst["greedy"] <= 1.05
    assert worst["contiguous"] > 1.3, "these packs are hard to balance"


def test_a_pack_that_does_not_divide_is_refused() -> None:
    packed = batch("ss", multiple=1)
    rows = packed.num_rows
    with pytest.raises(ValueError, match=f"{rows} rows cannot be split"):
        split_rows(packed, rows + 1, "contiguous")
    with pytest.raises(ValueError, match="multiple=2"):
        rank_batch(
            pack([Item("sequence", [TokenSequence(torch.arange(4))])]),
            place(2, 0),
            heads=2,
            kv_heads=1,
            head_dim=8,
            device=CPU,
        )


@pytest.mark.parametrize("kind", ["greedy", "contiguous", "zigzag"])
def test_targets_are_dealt_with_their_rows(kind: str) -> None:
    packed = batch("spg", seed=3)
    kept = torch.zeros(packed.num_targets)
    for rank in range(4):
        mine = rank_batch(packed, place(4, rank), heads=2, kv_heads=1, head_dim=8, device=CPU, split=kind)  # type: ignore[arg-type]
        kept += mine.keep_K
        assert torch.equal(mine.target_K, packed.target_K[mine.keep_K])
        row_K = mine.params.row_K
        assert row_K is not None
        ours = mine.tokens_1T[0][row_K], mine.position_ids_1T[0][row_K]
        rows = packed.hidden_row_K[mine.keep_K]
        assert torch.equal(ours[0], packed.tokens_T[rows])
        assert torch.equal(ours[1], packed.position_ids_T[rows])
        assert mine.tokens_1T.shape == (1, packed.num_rows // 4)
    assert bool((kept == 1).all())


def test_a_rank_without_targets_and_a_pack_without_items() -> None:
    only_late = Item("sequence", [TokenSequence(torch.arange(64), torch.arange(64) > 50)])
    packed = pack([only_late], multiple=8)
    first = rank_batch(packed, place(2, 0), heads=2, kv_heads=1, head_dim=8, device=CPU, split="contiguous")
    assert first.target_K.numel() == 0
    assert not first.keep_K.any()
    empty = rank_batch(pack([], multiple=8), place(2, 1), heads=2, kv_heads=1, head_dim=8, device=CPU)
    assert empty.tokens_1T.shape == (1, 4)
    assert empty.target_K.numel() == 0


def test_attention_work_of_all_ranks_is_that_of_the_pack() -> None:
    packed = batch("spgsp")
    options = {"heads": 2, "kv_heads": 1, "head_dim": 8, "device": CPU}
    whole = plan_attention(packed.cu_seqlens, packed.prefix_S2, **options)  # type: ignore[arg-type]
    parts = [rank_batch(packed, place(4, rank), **options).params.plan for rank in range(4)]  # type: ignore[arg-type]
    assert sum(part.attention_pairs for part in parts if part is not None) == whole.attention_pairs
    assert whole.attention_pairs == pairs(packed, [(0, packed.num_rows)])
