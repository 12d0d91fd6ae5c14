"""Checksums of servers' weights: which server and tensor changed, and servers that have none to give."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from tests.rollout.small_server import SmallServer, Status
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.weight_checksums import compared, first_difference, weight_checksums

PREFIX = "dp0:pp0:pcp0:tp0:"


def test_difference() -> None:
    before = {"a": {"w1": "1", "w2": "2"}, "b": {"w1": "1", "w2": "2", "w3": "3"}}
    assert first_difference(before, before) is None and compared(before, before) == 5
    after = {"a": dict(before["a"]), "b": {"w1": "1", "w2": "9", "w3": "8"}}
    found = first_difference(before, after)
    assert found is not None and (found.server, found.parameter, found.count, found.total) == ("b", "w2", 2, 3)
    assert "w2 of b has another checksum now (2 of 3 tensors have)" in str(found)
    assert first_difference({"a": {"w": "1"}}, {}) is None, "a server that was lost says nothing"
    assert first_difference({}, after) is None and compared({}, after) == 0


def test_servers() -> None:
    answer = {"checksums": {f"{PREFIX}w": "12", f"{PREFIX}packed": hashlib.sha256(b"").hexdigest()}}

    async def checker(_server: SmallServer, _path: str, body: Any) -> Any:
        assert body == {"action": "checksum"}
        return answer

    async def absent(_server: SmallServer, _path: str, _body: Any) -> Any:
        return Status(404)

    async def run() -> Any:
        async with (
            SmallServer(weight_checker=checker) as one,
            SmallServer(weight_checker=absent) as two,
        ):
            found = await weight_checksums([one.address, two.address, Address("127.0.0.1", 9)], 5.0)
            return found, str(one.address)

    found, address = asyncio.run(run())
    assert found == {address: {f"{PREFIX}w": "12"}}, "tensors that were packed away have none"
