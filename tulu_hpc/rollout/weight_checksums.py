"""Checksums that vLLM servers give of the weights they hold (0.32 and later; sha256 of each parameter of each worker).

They are of vLLM's own parameters (several of ours in one, split over its workers, and on a CPU partly packed away and
then empty), so they are compared with those of the same server at another time, not with the trainer's tensors.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tulu_hpc.rollout.http import Address, HttpError, request

Checksums = dict[str, str]
_EMPTY = hashlib.sha256().hexdigest()
_SECONDS = 600.0  # all weights are read once


async def weight_checksums(addresses: Sequence[Address], seconds: float = _SECONDS) -> dict[str, Checksums]:
    """By server, then by parameter in the model's order; servers that do not answer or give none are left out."""
    answers = await asyncio.gather(*(_ask(address, seconds) for address in addresses))
    return {str(address): answer for address, answer in zip(addresses, answers, strict=True) if answer}


async def _ask(address: Address, seconds: float) -> Checksums:
    try:
        answer = await request(address, "POST", "/weight_checker", {"action": "checksum"}, seconds=seconds)
    except HttpError:
        return {}
    found = answer.get("checksums") if isinstance(answer, dict) else None
    if not isinstance(found, dict):
        return {}
    return {str(name): str(digest) for name, digest in found.items() if digest != _EMPTY}


@dataclass(frozen=True)
class Difference:
    """The first parameter that a server held differently, and how many of how many."""

    server: str
    parameter: str
    count: int
    total: int

    def __str__(self) -> str:
        return f"{self.parameter} of {self.server} has another checksum now ({self.count} of {self.total} tensors have)"


def first_difference(before: dict[str, Checksums], after: dict[str, Checksums]) -> Difference | None:
    """Between two times, of the servers that answered at both."""
    for server, old in before.items():
        new = after.get(server)
        if new is None:
            continue
        names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
        if names:
            return Difference(server, names[0], len(names), len(dict.fromkeys((*old, *new))))
    return None


def compared(before: dict[str, Checksums], after: dict[str, Checksums]) -> int:
    """Parameters that have a checksum at both times."""
    return sum(len(old.keys() & after.get(server, {}).keys()) for server, old in before.items())
