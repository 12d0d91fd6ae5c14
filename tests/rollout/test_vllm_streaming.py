"""Completions and groups of the vLLM engine as they come, against small servers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from tests.rollout.small_server import SmallServer, Status, completion
from tests.rollout.test_vllm_client import requests, right
from tulu_hpc.rollout.engine import EngineError, ServersLostError
from tulu_hpc.rollout.vllm import VllmEngine


def engine_of(*servers: SmallServer, **options: Any) -> VllmEngine:
    values = {"vocab_size": 50, "deadline_seconds": 5.0, "probe_seconds": 0.1} | options
    return VllmEngine([server.address for server in servers], **values)


def gated(gates: dict[int, asyncio.Event]) -> Any:
    """A handler that answers the requests named in `gates` (by their first token) only when their gate is open."""

    async def handler(server: SmallServer, path: str, body: Any) -> Any:
        first = body["token_ids"][0]
        if first in gates:
            await gates[first].wait()
        return completion(body)

    return handler


def test_completions_come_one_by_one() -> None:
    """The second is there while the first is still being made."""

    async def run() -> None:
        gates, asked = {0: asyncio.Event()}, requests(3)
        async with SmallServer(gated(gates)) as server:
            found = {}
            async for place, each in engine_of(server).generate_stream(asked):
                found[place] = each
                if len(found) == 2:
                    assert set(found) == {1, 2}
                    gates[0].set()
            assert right([found[place] for place in range(3)], asked)

    asyncio.run(run())


def test_groups_come_whole() -> None:
    """In the order in which they are finished, with their answers in the order of their requests."""

    async def run() -> None:
        gates, asked = {0: asyncio.Event(), 3: asyncio.Event()}, requests(6)
        async with SmallServer(gated(gates)) as server:
            order, found = [], {}
            async for number, group in engine_of(server).generate_groups(asked, 2):
                order.append(number)
                found[number] = group
                if number == 2:
                    gates[3].set()
                if number == 1:
                    gates[0].set()
            assert order == [2, 1, 0]
            assert right([each for number in range(3) for each in found[number]], asked)
            with pytest.raises(ValueError, match="6 requests are no groups of 4"):
                async for _ in engine_of(server).generate_groups(asked, 4):
                    pass

    asyncio.run(run())


def test_what_came_before_a_failure_is_handed_out() -> None:
    async def bad(server: SmallServer, path: str, body: Any) -> Any:
        return Status(500) if body["token_ids"][0] == 2 else completion(body)

    async def die(server: SmallServer, path: str, body: Any) -> Any:
        if body["token_ids"][0] == 2:
            server.die()
            await asyncio.Event().wait()
        return completion(body)

    async def run(handler: Any) -> tuple[set[int], EngineError]:
        found = set()
        async with SmallServer(handler) as server:
            with pytest.raises(EngineError) as caught:
                async for place, _ in engine_of(server, max_in_flight=1, attempts=2).generate_stream(requests(3)):
                    found.add(place)
        return found, caught.value

    places, error = asyncio.run(run(bad))
    assert places == {0, 1} and "'r2' failed 2 times" in str(error)
    places, error = asyncio.run(run(die))
    assert places == {0, 1} and isinstance(error, ServersLostError) and set(error.completions) == places


def test_leaving_early_hangs_up() -> None:
    """The server need not finish what nobody waits for."""

    async def run() -> None:
        gates, asked = {1: asyncio.Event(), 2: asyncio.Event()}, requests(3)
        async with SmallServer(gated(gates)) as server:
            async with aclosing(engine_of(server).generate_stream(asked)) as stream:
                async for _ in stream:
                    while server.open < 2:
                        await asyncio.sleep(0)
                    break
            while server.hung_up < 2:
                await asyncio.sleep(0)

    asyncio.run(run())
