"""Updates over NCCL: what a server is asked for, and what becomes of one that refuses, hangs or leaves.

The server is small, its worker is a rank of the stub in this process; vLLM's own worker is in tests/engines.
"""

from __future__ import annotations

import asyncio
import base64
import math
import pickle
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ctypes import Structure, c_byte
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.rollout.small_server import SmallServer, Status
from tests.rollout.stub_nccl import Stub, stub, stub_library  # noqa: F401
from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.nccl import Communicator, Library
from tulu_hpc.rollout.nccl_sync import Dialect, NcclChannel, aligned, dialect_of, pickled_unique_id
from tulu_hpc.rollout.vllm import VllmEngine
from tulu_hpc.rollout.weight_buckets import buckets

CPU = torch.device("cpu")
LIMIT = 100
UPDATE = {"names", "dtype_names", "shapes"}
PACKING = {"packed": True, "packed_buffer_size_bytes": LIMIT, "packed_num_buffers": 2}
MODULE = "vllm.distributed.device_communicators.pynccl_wrapper"


def weights() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape, dtype in (
        ("a", (3, 5), torch.float32),
        ("b", (7,), torch.bfloat16),
        ("c", (4, 30), torch.float16),  # larger than a bucket
        ("d", (25,), torch.float32),  # just one
        ("e", (2, 2), torch.bfloat16),
    ):
        yield name, torch.randn(shape, generator=generator).to(dtype)


class Worker:
    """Rank 1 of the trainer's groups, and what the server answers."""

    def __init__(self, stub: Stub, version: str = "0.32.0") -> None:  # noqa: F811
        self.stub = stub
        self.version = version
        self.refuse: str | None = None  # the path that is answered with an error
        self.hang: str | None = None  # the path that is never answered
        self.received: dict[str, Tensor] = {}
        self.unique_ids: list[bytes] = []
        self.held = "default"
        self.rank: Communicator | None = None

    async def __call__(self, server: SmallServer, path: str, body: Any) -> Any:
        verb = path.strip("/").split("?")[0]
        if verb == self.refuse:
            return Status(500, f"no {verb}")
        if verb == self.hang:
            await asyncio.Event().wait()
        if verb == "init_weight_transfer_engine":
            await self._join(body["init_info"])
        elif verb == "update_weights":
            await self._receive(body["update_info"])
        elif verb == "update_weight_version":
            self.held = body["new_version"]
        elif verb == "finish_weight_update":
            self.held = (body or {}).get("weight_version", self.held)
        fixed = {
            "is_paused": {"is_paused": True},
            "get_world_size": {"world_size": 1},
            "version": {"version": self.version},
            "weight_info": {"weight_version": self.held},
        }
        return fixed.get(verb, {})

    async def _join(self, info: dict[str, Any]) -> None:
        unique_id = await self._unique_id(info)
        self.unique_ids.append(unique_id)
        self.leave()
        rank, size = info["rank_offset"], info["world_size"]
        self.rank = Communicator(Library(str(self.stub.path)), unique_id, rank, size, seconds=20.0, device=CPU)
        self.stream = self.stub.stream()
        await self._done(self.rank.joined)
        await self._done(self.rank.all_reduce(torch.zeros(1), self.stream))

    async def _unique_id(self, info: dict[str, Any]) -> bytes:
        if "nccl_unique_id_b64" in info:
            return base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        store = await asyncio.to_thread(
            dist.TCPStore, info["master_address"], info["master_port"], None, False, timedelta(seconds=10)
        )
        return bytes(unpickled(await asyncio.to_thread(store.get, "broadcast_from/0/0")).internal_bytes())

    async def _receive(self, info: dict[str, Any]) -> None:
        sizes = [math.prod(s) * getattr(torch, d).itemsize for s, d in zip(info["shapes"], info["dtype_names"])]
        content = torch.empty(sum(sizes), dtype=torch.uint8)
        assert self.rank is not None
        await self._done(self.rank.broadcast(content, 0, self.stream))
        for name, part, dtype, shape in zip(
            info["names"], content.split(sizes), info["dtype_names"], info["shapes"], strict=True
        ):
            self.received[name] = part.clone().view(getattr(torch, dtype)).view(shape)

    @staticmethod
    async def _done(call: Any) -> None:
        while not call.is_completed():
            await asyncio.sleep(0.0005)

    def leave(self) -> None:
        if self.rank is not None:
            self.rank.abort()


def unpickled(content: bytes) -> Any:
    """As vLLM's workers do, with a class of the name that they have."""

    class ncclUniqueId(Structure):
        _fields_ = [("internal", c_byte * 128)]

        def internal_bytes(self) -> bytes:
            return bytes(value & 255 for value in self.internal)

    module = ModuleType(MODULE)
    module.ncclUniqueId = ncclUniqueId  # type: ignore[attr-defined]
    parts = MODULE.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    before = {name: sys.modules.get(name) for name in names}
    try:
        sys.modules.update({name: module if name == MODULE else ModuleType(name) for name in names})
        return pickle.loads(content)
    finally:
        for name, found in before.items():
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found


def small_server(worker: Worker) -> SmallServer:
    verbs = (
        "version is_paused pause resume get_world_size init_weight_transfer_engine start_weight_update update_weights "
        "finish_weight_update update_weight_version weight_info"
    )
    return SmallServer(**{verb: worker for verb in verbs.split()})


def engine_of(stub: Stub, seconds: float, *servers: SmallServer) -> VllmEngine:  # noqa: F811
    channel = partial(NcclChannel, library=str(stub.path), bucket_bytes=LIMIT, device=CPU, new_stream=stub.stream)
    addresses = [server.address for server in servers]
    held = 2 * LIMIT  # a bucket is half of it
    return VllmEngine(addresses, vocab_size=50, sync_timeout_seconds=seconds, bucket_bytes=held, channel=channel)


@asynccontextmanager
async def serving(worker: Worker, seconds: float = 20.0) -> AsyncIterator[tuple[SmallServer, VllmEngine]]:
    async with small_server(worker) as server:
        engine = engine_of(worker.stub, seconds, server)
        try:
            yield server, engine
        finally:
            engine._channels[0].close()
            worker.leave()


def asked(server: SmallServer) -> list[str]:
    return [path for path, _ in server.requests]


def bodies(server: SmallServer, path: str) -> list[Any]:
    return [body for found, body in server.requests if found == path]


def check_received(worker: Worker) -> None:
    assert list(worker.received) == [name for name, _ in weights()]
    for name, tensor in weights():
        found = worker.received[name]
        assert found.dtype == tensor.dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("version", "meeting", "init", "update"),
    [
        ("0.25.0", {"master_address", "master_port"}, {}, PACKING),
        ("0.32.0", {"nccl_unique_id_b64"}, PACKING, {}),
        ("0.33.1rc1.dev4+g123", {"nccl_unique_id_b64"}, PACKING, {}),
    ],
)
def test_an_update(
    stub: Stub,  # noqa: F811
    version: str,
    meeting: set[str],
    init: dict[str, Any],
    update: dict[str, Any],
) -> None:
    """Both dialects: exactly these fields, everything arrives, and the safeguards are those of gloo."""
    worker = Worker(stub, version)

    async def act() -> SmallServer:
        async with serving(worker) as (server, engine):
            for number in (1, 2):
                await engine.update_weights(weights(), number)
                assert engine.serving() == [(server.address, number)]
            return server

    server = asyncio.run(act())
    check_received(worker)
    (info,) = (body["init_info"] for body in bodies(server, "/init_weight_transfer_engine"))
    assert set(info) == {"rank_offset", "world_size"} | meeting | set(init)
    assert info.items() >= (init | {"rank_offset": 1, "world_size": 2}).items()
    updates = [body["update_info"] for body in bodies(server, "/update_weights")]
    assert [each["names"] for each in updates] == [["a", "b"], ["c"], ["d"], ["e"]] * 2
    assert all(set(each) == UPDATE | set(update) and each.items() >= update.items() for each in updates)
    assert updates[0]["dtype_names"] == ["float32", "bfloat16"] and updates[0]["shapes"] == [[3, 5], [7]]
    sent = [int(count) for _, rank, count, *_ in stub.calls("ncclBroadcast") if rank == "0"]
    assert sent == [74, 240, 100, 8] * 2
    once = ["/pause?mode=keep&clear_cache=true", "/is_paused", "/update_weight_version"]
    assert asked(server)[1:4] == once
    assert bodies(server, "/update_weight_version") == [{"new_version": "dirty"}] * 2
    assert bodies(server, "/finish_weight_update") == [{"weight_version": "1"}, {"weight_version": "2"}]
    assert asked(server)[-1] == "/resume"


@pytest.mark.parametrize(
    ("fault", "words", "never"),
    [
        ({"refuse": "init_weight_transfer_engine"}, "init_weight_transfer_engine: status 500", "start_weight_update"),
        (
            {"hang": "init_weight_transfer_engine"},
            "no group: ncclCommInitRankConfig at rank 0 of 2: not done within 0.5 s; NCCL 2.29.7",
            "start_weight_update",
        ),
        ({"refuse": "update_weights"}, "update_weights: status 500", "finish_weight_update"),
        (
            {"hang": "update_weights"},
            "weights not sent: ncclBroadcast at rank 0 of 2: not done within 0.5 s; NCCL 2.29.7",
            "finish_weight_update",
        ),
    ],
)
def test_a_server_that_does_not_take_part(
    stub: Stub,  # noqa: F811
    fault: dict[str, str],
    words: str,
    never: str,
) -> None:
    """The communicator is aborted, the server stays paused and dirty, and the next update opens a new group."""
    worker = Worker(stub)

    async def act() -> None:
        async with serving(worker, 0.5) as (server, engine):
            for name, path in fault.items():
                setattr(worker, name, path)
            with pytest.raises(EngineError, match=words):
                await engine.update_weights(weights(), 1)
            assert ["ncclCommAbort", "0"] in stub.calls()
            assert f"/{never}" not in asked(server) and "/resume" not in asked(server)
            assert engine.serving() == [] and worker.held == "dirty"
            worker.refuse = worker.hang = None
            worker.received.clear()
            await engine.update_weights(weights(), 2)
            assert engine.serving() == [(server.address, 2)] and worker.held == "2"
            assert len(set(bytes(each) for each in worker.unique_ids)) == len(worker.unique_ids)

    asyncio.run(act())
    check_received(worker)


def test_one_of_two_servers_hangs(stub: Stub) -> None:  # noqa: F811
    """Each has a group of its own: the other gets all weights, and serves."""
    well, ill = Worker(stub), Worker(stub)
    ill.hang = "update_weights"

    async def act() -> None:
        async with small_server(well) as good, small_server(ill) as bad:
            engine = engine_of(stub, 0.5, good, bad)
            await engine.update_weights(weights(), 1)
            assert engine.serving() == [(good.address, 1)]
            (why,) = engine.missing()
            assert why.startswith(f"{bad.address}: weights not sent: ncclBroadcast at rank 0 of 2: not done within")
            ill.hang = None
            await engine.update_weights(weights(), 1, only_missing=True)
            assert engine.serving() == [(good.address, 1), (bad.address, 1)]
            for channel, worker in zip(engine._channels, (well, ill), strict=True):
                channel.close()
                worker.leave()

    asyncio.run(act())
    check_received(well)
    check_received(ill)
    assert len(well.unique_ids) == 1 and len(ill.unique_ids) == 2


@pytest.mark.parametrize("fault", ["error:ncclBroadcast:0:3", "error:ncclAllReduce:0:1", "refuse:ncclGetUniqueId:0:1"])
def test_an_error_of_the_library(stub: Stub, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:  # noqa: F811
    worker = Worker(stub)

    async def act() -> None:
        async with serving(worker) as (server, engine):
            monkeypatch.setenv("STUB_NCCL_FAULT", fault)
            with pytest.raises(EngineError, match=f"{fault.split(':')[1]}.*unhandled system error.*NCCL 2.29.7"):
                await engine.update_weights(weights(), 1)
            assert "/resume" not in asked(server) and worker.held == "dirty"
            monkeypatch.delenv("STUB_NCCL_FAULT")
            await engine.update_weights(weights(), 2)
            assert engine.serving() == [(server.address, 2)]

    asyncio.run(act())
    check_received(worker)


def test_a_version_whose_dialect_is_not_known(stub: Stub) -> None:  # noqa: F811
    worker = Worker(stub, "0.29.1")

    async def act() -> list[str]:
        async with serving(worker) as (server, engine):
            with pytest.raises(EngineError, match=r"known for vLLM 0\.25 and from 0\.32 on, not for 0\.29\.1"):
                await engine.update_weights(weights(), 1)
            return asked(server)

    assert "/init_weight_transfer_engine" not in asyncio.run(act())
    assert dialect_of("0.25.3") is Dialect.STORE and dialect_of("1.0") is Dialect.UNIQUE_ID
    for version in ("0.24.9", "dev", ""):
        with pytest.raises(ValueError, match="not for"):
            dialect_of(version)


def test_the_library_is_missing(stub: Stub, tmp_path: Path) -> None:  # noqa: F811
    worker = Worker(stub)

    async def act() -> None:
        async with serving(worker) as (_, engine):
            engine._channels[0].library = str(tmp_path / "libnccl.so.2")  # type: ignore[attr-defined]
            with pytest.raises(EngineError, match=r"NCCL cannot be loaded: .*rollout\.vllm\.nccl_library"):
                await engine.update_weights(weights(), 1)

    asyncio.run(act())


def test_pieces_in_which_every_tensor_can_be_viewed() -> None:
    shapes = [("a", torch.bfloat16, 3), ("b", torch.float32, 2), ("c", torch.uint8, 5), ("d", torch.uint8, 3)]
    shapes += [("e", torch.float64, 1), ("f", torch.bfloat16, 1), ("g", torch.uint8, 1), ("h", torch.bfloat16, 1)]
    tensors = [(name, torch.arange(size).to(dtype)) for name, dtype, size in shapes]
    (bucket,) = buckets(iter(tensors), 1000)
    pieces = list(aligned(bucket))
    assert [[name for name, _, _ in piece.metadata] for piece in pieces] == [
        ["a"],
        ["b", "c", "d", "e", "f", "g"],
        ["h"],
    ]
    assert torch.equal(torch.cat([part for piece in pieces for part in piece.parts]), torch.cat(bucket.parts))
    (same,) = buckets(iter(tensors[2:4]), 1000)
    (piece,) = aligned(same)
    assert piece.metadata == same.metadata and torch.equal(torch.cat(piece.parts), torch.cat(same.parts))


def test_the_pickled_unique_id() -> None:
    content = bytes(range(256))[64:192]
    assert unpickled(pickled_unique_id(content)).internal_bytes() == content
