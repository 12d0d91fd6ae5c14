"""The pack against a slow reading of its definition. What a model makes of a pack is tested with the models."""

from __future__ import annotations

import pytest
import torch

from tests.data.builders import random_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, pack, rows_of

MIXES = ["s", "p", "g", "S", "P", "G", "spg", "GSPpgs", "ppppp", "sgSsGp"]


def visible_text(batch: PackedBatch, row: int) -> list[tuple[int, int]]:
    """(token, position id) of every row that `row` attends to, in order, from the segment table alone."""
    segment = int(torch.searchsorted(batch.cu_seqlens, torch.tensor(row), right=True)) - 1
    low, high = batch.prefix_S2[segment].tolist()
    rows = [*range(low, high), *range(int(batch.cu_seqlens[segment]), row + 1)]
    return [(int(batch.tokens_T[r]), int(batch.position_ids_T[r])) for r in rows]


@pytest.mark.parametrize("kinds", MIXES)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_target_is_predicted_from_exactly_its_own_text(
    kinds: str, share: bool, drop_last: bool, multiple: int
) -> None:
    items = random_items(kinds, seed=3)
    batch = pack(items, share=share, multiple=multiple, pad_id=7, drop_last=drop_last)
    expected = []
    sequence = 0
    for item in items:
        for response in item.responses:
            text = [*item.prompt.tolist(), *response.tokens.tolist()]
            for t in range(len(response)):
                at = item.prompt.numel() + t
                if at and (response.mask is None or response.mask[t]):
                    expected.append((sequence, text[at], list(zip(text[:at], range(at), strict=True))))
            sequence += 1
    got = [
        (int(s), int(y), visible_text(batch, int(row)))
        for s, y, row in zip(batch.sequence_id_K, batch.target_K, batch.hidden_row_K, strict=True)
    ]
    assert got == expected
    assert batch.num_sequences == sequence
    assert batch.num_rows % multiple == 0
    assert batch.num_rows - sum(rows_of(item, share, drop_last) for item in items) in range(multiple)
    assert int(batch.cu_seqlens[-1]) == batch.num_rows
    assert (batch.cu_seqlens.diff() > 0).all(), "segments without rows must not be in the table"


@pytest.mark.parametrize("kinds", MIXES)
def test_shared_and_expanded_have_the_same_targets_and_columns_in_the_same_order(kinds: str) -> None:
    items = random_items(kinds, seed=5)
    shared, expanded = pack(items, share=True), pack(items, share=False)
    assert torch.equal(shared.target_K, expanded.target_K)
    assert torch.equal(shared.sequence_id_K, expanded.sequence_id_K)
    for name in ("old",):
        assert torch.equal(shared.per_target[name], expanded.per_target[name])
    for name in ("item", "kind", "advantage"):
        assert torch.equal(shared.per_sequence[name], expanded.per_sequence[name])
    assert not expanded.prefix_S2.any()


def test_row_order_is_prompts_ordinary_padding_responses() -> None:
    batch = pack(random_items("gsp", seed=1), multiple=16)
    has_prefix = (batch.prefix_S2[:, 1] > 0).tolist()
    assert has_prefix == sorted(has_prefix), "segments with a prefix come last"
    first_response = int(batch.cu_seqlens[has_prefix.index(True)])
    prompt_rows = batch.prefix_S2[batch.prefix_S2[:, 1] > 0]
    assert int(prompt_rows.min()) == 0
    assert int(prompt_rows.max()) <= first_response


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_pair_takes_at_most_prompt_plus_both_responses(drop_last: bool) -> None:
    for p, r1, r2 in [(50, 20, 30), (1, 1, 1), (300, 2, 2), (5, 400, 1)]:
        pair = Item(
            "pair", [TokenSequence(torch.arange(r1)), TokenSequence(torch.arange(r2))], prompt=torch.arange(p), id="x"
        )
        rows = pack([pair], drop_last=drop_last).num_rows
        assert rows == rows_of(pair, True, drop_last) <= p + r1 + r2
        assert pack([pair], share=False, drop_last=drop_last).num_rows == rows + p


def test_pairs_point_at_chosen_and_rejected() -> None:
    batch = pack(random_items("spgp"))
    assert batch.pairs_P2.tolist() == [[1, 2], [7, 8]]
    assert batch.per_sequence["kind"].tolist() == [0, 1, 2, 3, 3, 3, 3, 1, 2]
    assert batch.per_sequence["item"].tolist() == [0, 1, 1, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("multiple", [1, 4])
def test_an_empty_pack_has_padding_rows_and_no_targets(multiple: int) -> None:
    batch = pack([], multiple=multiple, pad_id=9)
    assert batch.tokens_T.tolist() == [9] * multiple
    assert (batch.num_targets, batch.num_sequences) == (0, 0)
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert batch.pairs_P2.shape == (0, 2)


def test_columns_that_an_item_lacks_are_nan() -> None:
    with_columns, without = random_items("pp")
    without.per_sequence, without.per_target = {}, {}
    batch = pack([with_columns, without])
    own = batch.per_sequence["item"][batch.sequence_id_K] == 0
    assert not batch.per_target["old"][own].isnan().any() and batch.per_target["old"][~own].isnan().all()
    assert batch.per_sequence["advantage"].isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Item("pair", [TokenSequence(torch.arange(2))], id="a7"), "a7.*two responses"),
        (lambda: Item("group", [TokenSequence(torch.arange(0))], id="a7"), "a7.*empty"),
        (lambda: Item("sequence", [TokenSequence(torch.arange(2))], per_sequence={"w": []}, id="a7"), "a7.*'w'"),
        (lambda: Item("sequence", [TokenSequence(torch.arange(2))], per_sequence={"kind": [1.0]}), "reserved"),
        (lambda: Item("set", [TokenSequence(torch.arange(2))]), "kind 'set'"),  # type: ignore[arg-type]
        (lambda: TokenSequence(torch.arange(2), torch.ones(3)), "mask has shape"),
        (lambda: pack([], multiple=0), "multiple"),
    ],
)
def test_impossible_items_are_refused_by_name(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


def test_packing_does_no_python_work_per_token() -> None:
    """Counted in executed lines, not in seconds: the same items with ten times longer responses cost the same."""
    import sys

    def lines(length: int) -> int:
        items = [
            Item("group", [TokenSequence(torch.arange(length)) for _ in range(4)], prompt=torch.arange(length), id="g")
        ]
        count = 0

        def trace(frame, event, argument):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            pack(items)
        finally:
            sys.settrace(previous)
        return count

    lines(10)  # first calls initialise things
    assert lines(1000) == lines(100)
