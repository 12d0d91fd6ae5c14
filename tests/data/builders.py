"""Random items for the tests of packing and loading."""

from __future__ import annotations

import random

import torch

from tulu_hpc.data.packed_batch import Item, TokenSequence


def tokens(rng: random.Random, low: int, high: int) -> torch.Tensor:
    return torch.tensor([rng.randrange(1000) for _ in range(rng.randint(low, high))])


def random_item(kind: str, seed: int, *, masked: bool = False) -> Item:
    """A sequence, a pair or a group of four, with a per-sequence and a per-target column."""
    rng = random.Random(seed)
    count = {"sequence": 1, "pair": 2, "group": 4}[kind]
    responses = []
    for _ in range(count):
        response = tokens(rng, 1, 12)
        mask = torch.tensor([rng.random() < 0.6 for _ in response]) if masked else None
        responses.append(TokenSequence(response, mask))
    return Item(
        kind,  # type: ignore[arg-type]
        responses,
        prompt=tokens(rng, 1, 9) if kind != "sequence" else tokens(rng, 0, 3).long(),
        per_sequence={"advantage": [rng.random() for _ in range(count)]},
        per_target={"old": [torch.rand(len(r)) for r in responses]},
        id=f"{kind}-{seed}",
        source="test",
    )


def random_items(kinds: str, seed: int = 0) -> list[Item]:
    """`kinds`: one letter per item: s sequence, p pair, g group; upper case: with masked spans."""
    names = {"s": "sequence", "p": "pair", "g": "group"}
    return [random_item(names[c.lower()], 1000 * seed + i, masked=c.isupper()) for i, c in enumerate(kinds)]
