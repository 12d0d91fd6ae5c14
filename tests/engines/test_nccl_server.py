"""Weights over NCCL into a whole vLLM server and its real model; NCCL and CUDA's streams are the stub's.

What a broken update leaves half loaded is put right by the next one, as over gloo.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import vllm_server as real
from tests.parallel.forked import WorkerError, run_forked
from tests.rollout.stub_nccl import Stub, stub_library  # noqa: F401
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.rollout.engine import EngineError, Request, Sampling
from tulu_hpc.rollout.nccl_sync import NcclChannel
from tulu_hpc.rollout.server import NCCL_BACKEND, Server
from tulu_hpc.rollout.vllm import VllmEngine

pytestmark = [real.needs_vllm, pytest.mark.timeout(300)]
PLUGIN = Path(__file__).parents[2] / "tulu_hpc" / "rollout" / "vllm_plugin"
LIMIT = 1e-4
BUCKET = 20_000
WORKER_SECONDS = 2.0


def interpreter(folder: Path, stub: Stub) -> Path:
    """vLLM's, with the plugin of this checkout and what puts the stub in place."""
    info = folder / "site" / "stub_nccl-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub-nccl\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nstub_nccl = nccl_workers:register\n")
    path = folder / "python"
    path.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={info.parent}:{Path(__file__).parent}:{PLUGIN} VLLM_PLUGINS=tulu_hpc,stub_nccl "
        f'STUB_NCCL_LIBRARY={stub.path}\nexec {real.PYTHON} "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def stub(folder: Path, stub_library: Path) -> Iterator[Stub]:  # noqa: F811
    (folder / "nccl").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUB_NCCL_FOLDER", str(folder / "nccl"))
        yield Stub(stub_library, folder / "nccl")


@pytest.fixture(scope="module")
def shape(folder: Path) -> Architecture:
    return real.write_model(folder, tied=True)


@pytest.fixture(scope="module")
def server(folder: Path, shape: Architecture, stub: Stub) -> Iterator[Server]:
    found = real.start(
        folder, python=str(interpreter(folder, stub)), weight_backend=NCCL_BACKEND, sync_seconds=WORKER_SECONDS
    )
    yield found
    found.stop()


def engine_of(server: Server, shape: Architecture, stub: Stub, seconds: float = 20.0) -> VllmEngine:
    channel = partial(
        NcclChannel, library=str(stub.path), bucket_bytes=BUCKET, device=torch.device("cpu"), new_stream=stub.stream
    )
    return VllmEngine(
        [server.address],
        vocab_size=shape.vocab_size,
        own=[server],
        probe_seconds=60.0,
        bucket_bytes=BUCKET,
        sync_timeout_seconds=seconds,
        channel=channel,
    )


def sync(engine: VllmEngine, model: Any, version: int) -> None:
    asyncio.run(engine.update_weights(iter(real.state(model)), version))


def check(engine: VllmEngine, model: Any, version: int) -> None:
    """The server draws with these weights, and says so."""
    asked = [Request([5 + n, 9, 30], Sampling(16), seed=n, id=str(n)) for n in range(6)]
    found = asyncio.run(engine.generate(asked))
    assert real.largest_difference(model, asked, found) < LIMIT
    assert {each.policy_version for each in found} == {version}


def test_updates_reach_the_engine(server: Server, shape: Architecture, stub: Stub, folder: Path) -> None:
    model, engine = real.hf_model(folder), engine_of(server, shape, stub)
    for version in (1, 2):
        real.perturb(model, version)
        sync(engine, model, version)
        check(engine, model, version)
    assert [call[2:] for call in stub.calls("ncclCommInitRankConfig")] == [["2", "nonblocking"]], "one group for both"


def test_an_update_that_broke_off(
    server: Server, shape: Architecture, stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer stops sending amid the layers; the worker leaves by its own deadline."""
    model, engine = real.hf_model(folder), engine_of(server, shape, stub, 1.0)
    monkeypatch.setenv("STUB_NCCL_FAULT", "hang:ncclBroadcast:0:4")
    with pytest.raises(EngineError, match=r"weights not sent: ncclBroadcast at rank 0 of 2: not done within 1 s"):
        sync(engine, model, 3)
    assert engine.serving() == []
    monkeypatch.delenv("STUB_NCCL_FAULT")
    real.perturb(model, 4)
    sync(engine, model, 4)
    check(engine, model, 4)


def test_a_trainer_killed_in_an_update(server: Server, shape: Architecture, stub: Stub, folder: Path) -> None:
    model = real.hf_model(folder)

    def die() -> None:
        os.environ["STUB_NCCL_FAULT"] = "die:ncclBroadcast:0:4"
        sync(engine_of(server, shape, stub), model, 5)

    with pytest.raises(WorkerError):
        run_forked(1, die)
    real.perturb(model, 6)
    engine = engine_of(server, shape, stub)
    sync(engine, model, 6)
    check(engine, model, 6)
