"""The loader alone: what it hands to ranks and how it continues. Layout invariance of losses is tested in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from tests.data.builders import random_items
from tulu_hpc.data.loader import ItemLoader, StepData, deal, pack_items, split_group, tokens_of
from tulu_hpc.data.packed_batch import Item, TokenSequence, rows_of

ITEMS = random_items("spgspgSPGspgspgspSpgs", seed=2)


def loader(rank: int = 0, size: int = 1, **changes: object) -> ItemLoader:
    settings: dict = {"global_batch_size": 6, "seed": 11, "epochs": 2, "pack_rows": 64, "multiple": 4, **changes}
    return ItemLoader(ITEMS, dp_rank=rank, dp_size=size, **settings)


def packed_ids(step: StepData) -> list[str]:
    return [name for pack in step.packs for name in pack.item_ids]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_id_once_per_epoch_over_all_ranks(size: int) -> None:
    loaders = [loader(rank, size) for rank in range(size)]
    seen: list[str] = []
    for _ in range(loaders[0].num_steps):
        steps = [each.next_step() for each in loaders]
        assert len({tuple(step.item_ids) for step in steps}) == 1
        together = [name for step in steps for name in packed_ids(step)]
        assert sorted(together) == sorted(steps[0].item_ids)
        assert steps[0].num_items_global == len(steps[0].item_ids)
        assert all(pack.num_rows <= 64 and pack.num_rows % 4 == 0 for step in steps for pack in step.packs)
        seen += steps[0].item_ids
    names = sorted(item.id for item in ITEMS)
    assert sorted(seen[: len(ITEMS)]) == names and sorted(seen[len(ITEMS) :]) == names
    assert seen[: len(ITEMS)] != seen[len(ITEMS) :], "each epoch has its own order"
    with pytest.raises(RuntimeError, match="no step beyond"):
        loaders[0].next_step()


def test_global_batches_do_not_depend_on_the_layout() -> None:
    one = [step.item_ids for step in loader()]
    for size in (2, 3):
        assert [step.item_ids for step in loader(size - 1, size, multiple=8, share=False, pack_rows=96)] == one
    assert [step.item_ids for step in loader(seed=12)] != one
    plain = [name for step in loader(shuffle=False, epochs=1) for name in step.item_ids]
    assert plain == [item.id for item in ITEMS]


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 6])
def test_a_saved_position_continues_the_same_stream_on_another_layout(taken: int) -> None:
    whole = [step.item_ids for step in loader()]
    before = loader(1, 2)
    for _ in range(taken):
        before.next_step()
    state = json.loads(json.dumps(before.state_dict()))
    after = [loader(rank, 3) for rank in range(3)]
    for each in after:
        each.load_state_dict(state)
        assert each.step == taken
    rest = [[step.item_ids for step in each] for each in after]
    assert rest[0] == rest[1] == rest[2] == whole[taken:]


def test_a_resumed_loader_makes_bit_identical_packs() -> None:
    first, second = loader(1, 2), loader(1, 2)
    first.next_step()
    second.load_state_dict(first.state_dict())
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.packs, b.packs, strict=True):
            assert torch.equal(x.tokens_T, y.tokens_T) and torch.equal(x.hidden_row_K, y.hidden_row_K)


def test_a_state_of_other_data_or_another_seed_is_refused() -> None:
    state = loader().state_dict()
    with pytest.raises(ValueError, match="seed was 11, is now 3"):
        loader(seed=3).load_state_dict(state)
    other = ItemLoader(ITEMS[:-1] + random_items("s", seed=99), global_batch_size=6, seed=11, epochs=2)
    with pytest.raises(ValueError, match="fingerprint"):
        other.load_state_dict(state)


def test_length_of_a_run() -> None:
    assert loader(epochs=1).num_steps == 4  # 21 items in batches of 6; the last has 3
    assert [step.num_items_global for step in loader(epochs=1)] == [6, 6, 6, 3]
    assert loader(epochs=None, steps=9).num_steps == 9
    assert [step.num_items_global for step in loader(epochs=None, steps=5)] == [6] * 5
    assert loader(epochs=2, steps=3).num_steps == 3
    assert loader(epochs=0.5).num_steps == 2


def test_ranks_get_balanced_rows() -> None:
    sizes = [rows_of(item) for item in random_items("spg" * 40, seed=8)]
    for ranks in (2, 4, 8):
        loads = [sum(sizes[i] for i in hand) for hand in deal(sizes, ranks)]
        assert max(loads) - min(loads) <= max(sizes)


def test_batches_counted_in_tokens() -> None:
    def by_tokens(rank: int = 0, size: int = 1, **changes: object) -> ItemLoader:
        return loader(rank, size, **{"global_batch_size": None, "global_batch_tokens": 90, **changes})

    size = {item.id: tokens_of(item) for item in ITEMS}
    steps = list(by_tokens())
    assert len(steps) == by_tokens().num_steps > 2
    for step, after in pairwise(steps):
        assert sum(size[name] for name in step.item_ids) <= 90
        assert sum(size[name] for name in step.item_ids) + size[after.item_ids[0]] > 90, "the next one had no room"
    stream = [name for step in steps for name in step.item_ids]
    assert stream == [name for step in loader() for name in step.item_ids], "the same stream, cut otherwise"
    for changes in ({"size": 3}, {"share": False}, {"pack_rows": 96, "multiple": 8}):
        assert [step.item_ids for step in by_tokens(**changes)] == [step.item_ids for step in steps]
    again = by_tokens()
    state = [again.next_step(), again.state_dict()][1]
    other = by_tokens(1, 2)
    other.load_state_dict(state)
    assert [step.item_ids for step in other] == [step.item_ids for step in steps[1:]]
    assert [len(step.item_ids) for step in by_tokens(global_batch_tokens=1, epochs=1)] == [1] * len(ITEMS)
    assert by_tokens(epochs=None, steps=50).num_steps == 50
    with pytest.raises(ValueError, match="not both"):
        by_tokens(global_batch_size=3)


def test_ranks_are_balanced_by_the_given_cost() -> None:
    items = [Item("sequence", [TokenSequence(torch.arange(n))], id=str(n)) for n in (60, 60, *range(2, 32))]

    def cost(item: Item) -> float:
        return rows_of(item) ** 2

    def loads(measure: Callable[[Item], float] | None) -> list[float]:
        found = []
        for rank in range(4):
            step = ItemLoader(
                items, global_batch_size=32, seed=0, steps=1, dp_rank=rank, dp_size=4, pack_rows=64, cost=measure
            ).next_step()
            found.append(sum(cost(items[[i.id for i in items].index(n)]) for p in step.packs for n in p.item_ids))
        return found

    by_rows, by_cost = loads(None), loads(cost)
    assert max(by_cost) / (sum(by_cost) / 4) < 1.15 < max(by_rows) / (sum(by_rows) / 4)


def test_a_rank_without_items_gets_one_empty_pack() -> None:
    steps = [loader(rank, 5, global_batch_size=2, epochs=None, steps=1).next_step() for rank in range(5)]
    assert sum(step.packs[0].num_targets == 0 for step in steps) == 3
    assert all(len(step.packs) == 1 for step in steps)


def test_a_long_group_is_split_with_its_prompt_repeated() -> None:
    group = Item(
        "group",
        [TokenSequence(torch.arange(10 + i)) for i in range(6)],
        prompt=torch.arange(5),
        per_sequence={"advantage": [float(i) for i in range(6)]},
        per_target={"old": [torch.arange(10.0 + i) + 100 * i for i in range(6)]},
        id="long",
    )
    parts = split_group(group, 40)
    assert all(rows_of(part) <= 40 and torch.equal(part.prompt, group.prompt) for part in parts)
    assert [v for part in parts for v in part.per_sequence["advantage"]] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    packs = pack_items([group], capacity=40)
    assert sum(pack.num_targets for pack in packs) == sum(len(r) for r in group.responses)
    old = torch.cat([pack.per_target["old"] for pack in packs])
    assert torch.equal(old.sort().values, torch.cat(group.per_target["old"]).sort().values)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item("sequence", [TokenSequence(torch.arange(80))], id="big", source="flan"), "item 'big' of flan.*79 rows"),
        (Item("pair", [TokenSequence(torch.arange(40))] * 2, prompt=torch.arange(40), id="two"), "'two'.*pair"),
        (Item("group", [TokenSequence(torch.arange(70))] * 2, prompt=torch.arange(4), id="grp"), "'grp'.*response 0"),
    ],
)
def test_what_fits_nowhere_is_named_before_the_first_step(item: Item, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemLoader([*ITEMS, item], global_batch_size=2, seed=0, epochs=1, pack_rows=64)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        ItemLoader([], global_batch_size=2, seed=0, epochs=1)
