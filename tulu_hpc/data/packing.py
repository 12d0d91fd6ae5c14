"""Which items share a pack: best-fit decreasing bin packing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over as few bins as best-fit decreasing needs.

    Items are placed largest first, each into the fullest bin that still has room (ties: the oldest bin); equal sizes
    keep their order. The result is a pure function of its arguments, so every rank computes the same one.
    Best-fit decreasing uses at most 11/9 of the optimal number of bins, plus 4 (Johnson et al., 1974).

    Args:
        sizes: rows of each item.
        capacity: rows of a bin.

    Returns:
        Bins as ascending lists of indices into `sizes`, ordered by their smallest index. No items: no bins.

    Raises:
        ValueError: an item is larger than a bin (naming its index), or a size is negative.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, need at least 1 row")
    for index, size in enumerate(sizes):
        if size < 0:
            raise ValueError(f"item {index} has a negative size: {size}")
        if size > capacity:
            raise ValueError(f"item {index} has {size} rows, a pack holds {capacity}")
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (rows left, bin), sorted, so that the first fit found is the best
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        slot = bisect_left(free, (sizes[index], -1))
        if slot == len(free):
            left, chosen = capacity, len(bins)
            bins.append([])
        else:
            left, chosen = free.pop(slot)
        bins[chosen].append(index)
        insort(free, (left - sizes[index], chosen))
    return sorted(sorted(members) for members in bins)
