from __future__ import annotations

import random

import pytest

from tulu_hpc.data.packing import best_fit


def test_every_item_is_in_one_bin_and_no_bin_is_too_full() -> None:
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randint(0, 60) for _ in range(rng.randint(0, 80))]
        bins = best_fit(sizes, 64)
        assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in b) <= 64 for b in bins)
        lower = -(-sum(sizes) // 64)
        assert len(bins) <= 11 / 9 * max(lower, sum(s > 32 for s in sizes)) + 4
        assert bins == best_fit(sizes, 64)


def test_a_known_packing() -> None:
    # 6 takes a bin, 5 another; 4 fits 6's exactly, 3 goes to 5's, 2 completes it.
    assert best_fit([2, 3, 4, 5, 6], 10) == [[0, 1, 3], [2, 4]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize(("sizes", "message"), [([3, 11], "item 1 has 11 rows"), ([-1], "item 0")])
def test_impossible_sizes_are_named(sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_fit(sizes, 10)


def test_large_inputs_stay_near_linear() -> None:
    """Counted in comparisons of the sizes: n log n, not n squared."""

    class Counted(int):
        comparisons = 0

        def __lt__(self, other: object) -> bool:
            Counted.comparisons += 1
            return int.__lt__(self, other)  # type: ignore[operator]

    rng = random.Random(1)
    best_fit([Counted(rng.randint(1, 999)) for _ in range(20_000)], 4096)
    assert Counted.comparisons < 20_000 * 60
