"""Weights over NCCL, received by vLLM's own code: its dataclasses, its packing, its communicator.

No GPU is there: NCCL is a library of the same interface (tests/rollout/stub_nccl.cpp), so nothing of this says how the
real one behaves. What it shows is that both sides agree on the requests, on the calls and on every byte.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engines import vllm_server as real
from tests.parallel.forked import run_forked
from tests.rollout.stub_nccl import VERSION, Stub, stub_library  # noqa: F401
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.build import build_model, padded_vocab
from tulu_hpc.models.convert import iter_hf_tensors, load_hf
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.names import hf_shapes
from tulu_hpc.parallel.layout import Layout, initialize
from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.http import Address, request
from tulu_hpc.rollout.nccl_sync import Dialect, NcclChannel, aligned, pickled_unique_id
from tulu_hpc.rollout.vllm import VllmEngine
from tulu_hpc.rollout.weight_buckets import buckets

pytestmark = [real.needs_vllm, pytest.mark.timeout(300)]
PLUGIN = Path(__file__).parents[2] / "tulu_hpc" / "rollout" / "vllm_plugin"
SECONDS = 30.0


LLAMA = {"model_type": "llama"}


class Workers:
    """`nccl_workers.py`."""

    def __init__(self, count: int, library: Path, folder: Path) -> None:
        self.library, self.folder = library, folder
        folder.mkdir()
        self.process = subprocess.Popen(
            [real.PYTHON, Path(__file__).with_name("nccl_workers.py"), str(count), library, folder],
            env=os.environ
            | {"PYTHONPATH": str(PLUGIN), "STUB_NCCL_FOLDER": str(folder), "VLLM_LOGGING_LEVEL": "ERROR"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        port = next((int(line.split()[1]) for line in self.process.stdout if line.startswith("port ")), None)
        assert port is not None, "the workers ended while they started"
        self.address = Address("127.0.0.1", port)

    def stop(self) -> None:
        self.process.kill()  # by the plugin's die_with_parent the workers too
        self.process.wait()

    def ask(self, verb: str, body: Any = None) -> Any:
        return asyncio.run(request(self.address, "POST", f"/{verb}", body, seconds=SECONDS))

    def configure(self, kind: str, shape: Architecture, count: int = 1) -> dict[str, list[str]]:
        """The fields of the engine's requests."""
        self.count, self.stub = count, Stub(self.library, self.folder)
        body = {"kind": kind, "workers": count, "config": shape.to_hf() | LLAMA}
        fields: dict[str, list[str]] = self.ask("configure", body)  # the engine before leaves its group
        self.stub.forget()
        return fields

    def fault(self, fault: str, seconds: float) -> None:
        """Of the workers, that leave a group after so long in a broadcast."""
        self.ask("environment", {"STUB_NCCL_FAULT": fault, "TULU_HPC_SYNC_SECONDS": str(seconds)})

    def engine(self, bucket_bytes: int, seconds: float = SECONDS) -> VllmEngine:
        channel = partial(
            NcclChannel,
            library=str(self.library),
            bucket_bytes=bucket_bytes,
            device=torch.device("cpu"),
            new_stream=self.stub.stream,
        )
        return VllmEngine(
            [self.address],
            vocab_size=100,
            bucket_bytes=2 * bucket_bytes,  # one is sent while another is gathered
            sync_timeout_seconds=seconds,
            channel=channel,
        )

    def check_received(self, expected: dict[str, Tensor]) -> None:
        """By each worker in its last update: these, in this order, bit for bit."""
        for rank in range(self.count):
            found = torch.load(self.folder / f"received-{rank}.pt")
            assert [name for name, _ in found] == list(expected)
            for name, tensor in found:
                assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
                assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def workers(stub_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:  # noqa: F811
    folder = tmp_path_factory.mktemp("workers") / "nccl"
    found = Workers(2, stub_library, folder)
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _stub_settings(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_NCCL_FOLDER", str(workers.folder))
    monkeypatch.delenv("STUB_NCCL_FAULT", raising=False)
    workers.fault("", SECONDS)


def written(folder: Path, tied: bool) -> Architecture:
    """A model in `folder` whose vocabulary two ranks cannot share evenly."""
    shape = real.architecture(101, tied=tied)
    random_hf_model(shape, folder, seed=1, embedding_std=0.2, linear_std=0.1)
    return shape


def weights(folder: Path, shape: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the trainer has after it has loaded the model, in the order in which it sends."""
    files = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: files[name].to(dtype) for name in hf_shapes(shape)}


@pytest.mark.parametrize(
    ("kind", "count", "layout", "tied", "dtype"),
    [
        ("stock", 1, Layout(), False, torch.float32),
        ("stock", 2, Layout(tensor=2), True, torch.bfloat16),
        ("ours", 1, Layout(pipeline=2), True, torch.float32),
        ("ours", 2, Layout(tensor=2, pipeline=2), False, torch.bfloat16),
    ],
)
def test_every_bit_arrives(
    workers: Workers, tmp_path: Path, kind: str, count: int, layout: Layout, tied: bool, dtype: torch.dtype
) -> None:
    """From shards to vLLM's receivers, for buckets smaller than a tensor, of some tensors, and of the whole model."""
    shape = written(tmp_path / "model", tied)
    workers.configure(kind, shape, count)
    expected = weights(tmp_path / "model", shape, dtype)
    sizes = [tensor.numel() * tensor.element_size() for tensor in expected.values()]
    limits = (1, max(sizes), sizes[1] + sizes[2], 1 << 20)
    assert padded_vocab(shape.vocab_size, 2) > shape.vocab_size and sum(sizes) < limits[-1]

    def send() -> None:
        groups = initialize(layout, seed=0)
        chunks = build_model(shape, groups, dtype=dtype)
        load_hf(chunks, tmp_path / "model", shape, groups)
        for version, limit in enumerate(limits):
            stream = iter_hf_tensors(chunks, shape, groups)
            if groups.is_main:
                engine = workers.engine(limit)
                whole = ((name, tensor) for name, tensor in stream if tensor is not None)
                asyncio.run(engine.update_weights(whole, version))
                workers.check_received(expected)
            for _ in stream:
                pass

    run_forked(layout.tensor * layout.pipeline, send, timeout=120)
    assert not workers.stub.calls("mismatch")
    sent = [[int(call[2]) for call in workers.stub.calls("ncclBroadcast") if call[1] == "0"]]
    sent += [
        [int(call[2]) for call in workers.stub.calls("ncclBroadcast") if call[1] == str(rank)]
        for rank in range(1, 1 + count)
    ]
    assert all(each == sent[0] for each in sent) and sum(sent[0]) == len(limits) * sum(sizes)
    assert sent[0][: len(sizes)] == sizes and sent[0][-1] == sum(sizes), "a tensor, and all of them, at a time"


def random_cases(workers: Workers, folder: Path, count: int) -> tuple[int, int]:
    """Any tensors and any bucket size: what vLLM receives is what was sent, each piece by one broadcast.

    Returns:
        Tensors and broadcasts in all.
    """
    workers.configure("stock", written(folder / "model", tied=True), 2)
    generator = torch.Generator().manual_seed(count)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    engine, tensors, packed = workers.engine(1), 0, 0
    for case in range(count):
        sent = {}
        for number in range(draw(1, 30)):
            dtype = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)[draw(0, 4)]
            shape = [draw(1, 9) for _ in range(draw(1, 4))]
            sent[f"t{number}"] = torch.randint(0, 256, shape, generator=generator).to(dtype)
        limit = draw(1, 1500)
        for channel in engine._channels:
            assert isinstance(channel, NcclChannel)
            channel.close()  # the size is agreed when the group is opened
            channel.bucket_bytes = limit
        engine.bucket_bytes = 2 * limit
        workers.stub.forget()
        asyncio.run(engine.update_weights(iter(sent.items()), case))
        workers.check_received(sent)
        pieces = [piece for bucket in buckets(sent.items(), limit) for piece in aligned(bucket)]
        expected = [str(sum(part.numel() for part in piece.parts)) for piece in pieces]
        for rank in "012":
            assert [call[2] for call in workers.stub.calls("ncclBroadcast") if call[1] == rank] == expected
        tensors, packed = tensors + len(sent), packed + len(expected)
    assert not workers.stub.calls("mismatch")
    return tensors, packed


def test_random_tensors(workers: Workers, tmp_path: Path) -> None:
    random_cases(workers, tmp_path, 8)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_many_random_tensors(workers: Workers, tmp_path: Path, soak_figures: Callable[..., None]) -> None:
    cases = 500
    tensors, packed = random_cases(workers, tmp_path, cases)
    soak_figures(cases=cases, tensors=tensors, broadcasts=packed)


def test_requests_have_the_fields_of_the_installed_vllm(workers: Workers, tmp_path: Path) -> None:
    """vLLM refuses unknown fields itself; here also that none is left to its default."""
    shape = written(tmp_path / "model", tied=True)
    fields = workers.configure("stock", shape)
    bucket = next(iter(buckets(weights(tmp_path / "model", shape).items(), 1000)))
    meeting = {"nccl_unique_id_b64": ""}
    assert set(Dialect.UNIQUE_ID.update_info(bucket, 1000)) == set(fields["update"])
    unused = {"master_address", "master_port"}  # the other way to meet
    assert set(Dialect.UNIQUE_ID.init_info(2, 1000, meeting)) == set(fields["init"]) - unused


def test_the_unique_id_in_a_store_is_of_vllms_class(workers: Workers) -> None:
    content = bytes(range(256))[100:228]
    module, found = workers.ask("unpickle", {"content": list(pickled_unique_id(content))})
    assert module == "vllm.distributed.device_communicators.pynccl_wrapper" and bytes(found) == content


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang:ncclBroadcast:2:3", "ncclBroadcast at rank 0 of 3: not done within 1 s"),  # at a worker
        ("hang:ncclBroadcast:0:3", "ncclBroadcast at rank 0 of 3: not done within 1 s"),  # at the trainer
        ("error:ncclBroadcast:0:3", "ncclBroadcast at rank 0 of 3: unhandled system error"),
    ],
)
def test_a_broken_broadcast(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    """The trainer says so and aborts; the workers leave by their own deadline, and the next update comes through."""
    shape = written(tmp_path / "model", tied=True)
    workers.configure("ours", shape, 2)
    workers.fault(fault, seconds=1.5)
    expected = weights(tmp_path / "model", shape)
    engine = workers.engine(30_000, seconds=1.0)

    async def act() -> None:
        with pytest.raises(EngineError, match=f"weights not sent: {words}.*; NCCL {VERSION}"):
            await engine.update_weights(iter(expected.items()), 1)
        assert ["ncclCommAbort", "0"] in workers.stub.calls()
        monkeypatch.delenv("STUB_NCCL_FAULT")
        # The workers are busy until their deadline; then an update begins as any other.
        await request(workers.address, "POST", "/environment", {"STUB_NCCL_FAULT": ""}, seconds=SECONDS)
        await engine.update_weights(iter(expected.items()), 2)

    monkeypatch.setenv("STUB_NCCL_FAULT", fault)
    asyncio.run(act())
    workers.check_received(expected)
    assert len(workers.stub.calls("ncclCommAbort")) == 3, "all ranks have left the broken group"


def test_safeguards(workers: Workers, tmp_path: Path) -> None:
    """Another shape and a missing parameter are refused, and the server is not resumed before a full update."""
    shape = written(tmp_path / "model", tied=False)
    workers.configure("ours", shape)
    expected = weights(tmp_path / "model", shape)
    name = "model.layers.0.self_attn.k_proj.weight"
    cut, fewer = expected | {name: expected[name][:-1]}, {key: expected[key] for key in expected if key != name}

    async def act() -> None:
        engine = workers.engine(30_000)
        for version, wrong, words in (
            (1, cut, r"k_proj\.weight has shape \[63, 64\], the served model wants \[64, 64\]"),
            (2, fewer, "1 parameters were never sent: model.layers.0.self_attn.k_proj.weight"),
        ):
            with pytest.raises(EngineError, match=words):
                await engine.update_weights(iter(wrong.items()), version)
            assert await request(workers.address, "GET", "/is_paused", seconds=SECONDS) == {"is_paused": True}
            info = await request(workers.address, "GET", "/weight_info", seconds=SECONDS)
            assert info == {"weight_version": "dirty"}
        await engine.update_weights(iter(expected.items()), 3)
        assert await request(workers.address, "GET", "/is_paused", seconds=SECONDS) == {"is_paused": False}

    asyncio.run(act())
    workers.check_received(expected)
