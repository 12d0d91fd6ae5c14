"""Dead servers: ours are started again without holding up the others, those elsewhere are waited for."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.rollout import test_server_lifetime as stand_in
from tests.rollout.small_server import SmallServer
from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.revival import revive
from tulu_hpc.rollout.server import ServerOptions, free_port

options = stand_in.options


def test_only_a_dead_server_is_started_again(options: ServerOptions) -> None:
    server, (api, _) = stand_in.started(options)
    try:
        assert asyncio.run(revive([server.address], [server], 20.0, 1.0)) == []
        os.kill(api, signal.SIGKILL)
        server.wait()
        assert asyncio.run(revive([server.address], [server], 20.0, 1.0)) == [server.address]
        assert server.ready  # the only one: waited for
        assert asyncio.run(revive([server.address], [server], 20.0, 1.0)) == []
    finally:
        server.stop()


def test_others_serve_meanwhile(options: ServerOptions) -> None:
    """Nobody waits for a server that starts while another answers, nor is it started a second time."""
    server, (api, _) = stand_in.started(options)

    async def run() -> None:
        async with SmallServer() as other:
            both = [server.address, other.address]
            os.kill(api, signal.SIGKILL)
            server.wait()
            (Path(options.model) / "pids").unlink()
            assert await revive(both, [server], 20.0, 1.0) == [server.address]
            first = server.pid
            assert not server.ready and await revive(both, [server], 20.0, 1.0) == []
            await server.wait_ready(20.0)
            assert server.pid == first and await revive(both, [server], 20.0, 1.0) == []

    try:
        asyncio.run(run())
    finally:
        server.stop()


def test_a_server_elsewhere_comes_back() -> None:
    async def run() -> None:
        async with SmallServer() as server:
            server.die()
            told = asyncio.Event()
            waiting = asyncio.create_task(revive([server.address], [], 20.0, 1.0, lambda reason: told.set()))
            await told.wait()
            server._server = await asyncio.start_server(server._serve, server.address.host, server.address.port)
            assert await waiting == []

    asyncio.run(run())


def test_none_comes_back(options: ServerOptions) -> None:
    nobody = Address("127.0.0.1", free_port("127.0.0.1"))
    with pytest.raises(EngineError, match=rf"no vLLM server is left: .*{nobody}/is_paused"):
        asyncio.run(revive([nobody], [], 0.01, 1.0))
    (Path(options.model) / "broken").touch()
    server = stand_in.Server(options, Path(options.model) / "log")
    server.wait()
    try:
        with pytest.raises(EngineError, match=r"(?s)no vLLM server is left: .*cannot be loaded"):
            asyncio.run(revive([server.address], [server], 20.0, 1.0))
    finally:
        server.stop()
