"""Servers that are dead: ours are started again, those elsewhere are waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.http import Address, HttpError
from tulu_hpc.rollout.server import Server, probe

_POLL_SECONDS = 0.2


async def silence(address: Address, seconds: float) -> str | None:
    """Why a server's engine does not answer, or None if it does."""
    try:
        await probe(address, seconds)
    except HttpError as error:
        return str(error)
    return None


async def revive(
    addresses: Sequence[Address],
    own: Sequence[Server],
    start_seconds: float,
    probe_seconds: float,
    waiting: Callable[[str], None] = lambda reason: None,
) -> list[Address]:
    """Start those of `own` again that are dead (and not just starting); return when any server answers.

    Args:
        waiting: told why, when none answers at first.

    Returns:
        Those that were started again; they may be starting still.

    Raises:
        EngineError: none answers within `start_seconds`; what was the matter with each.
    """
    found = await asyncio.gather(*(silence(address, probe_seconds) for address in addresses))
    silent = {address for address, problem in zip(addresses, found, strict=True) if problem is not None}
    dead = []
    for server in own:
        if server.address not in silent:
            server.ready = True
        elif not server.is_starting(start_seconds):
            dead.append(server)
    await asyncio.gather(*(asyncio.to_thread(server.restart) for server in dead))
    if len(silent) == len(addresses):
        waiting(f"waiting up to {start_seconds:g} s for a vLLM server: {'; '.join(map(str, found))}")
        await _wait_for_one(addresses, own, start_seconds, probe_seconds)
    return [server.address for server in dead]


async def _wait_for_one(
    addresses: Sequence[Address], own: Sequence[Server], start_seconds: float, probe_seconds: float
) -> None:
    mine = {server.address: server for server in own}

    async def answers(address: Address) -> None:
        if address in mine:
            return await mine[address].wait_ready(start_seconds)
        deadline = time.monotonic() + start_seconds
        while (problem := await silence(address, probe_seconds)) is not None:
            if time.monotonic() > deadline:
                raise EngineError(f"{address}: does not answer within {start_seconds:g} s: {problem}")
            await asyncio.sleep(_POLL_SECONDS)

    pending = {asyncio.create_task(answers(address)) for address in addresses}
    problems: list[str] = []
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() is None for task in done):
                return
            problems += [str(task.exception()) for task in done]
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    raise EngineError("no vLLM server is left: " + "; ".join(problems))
