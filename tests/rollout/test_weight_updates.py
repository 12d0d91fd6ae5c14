"""Buckets, what a full set of weights is, and updates of servers that refuse; a real vLLM is in tests/engines."""

from __future__ import annotations

import asyncio
import importlib.util
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.small_server import SmallServer, Status
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.names import hf_shapes
from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.vllm import VllmEngine
from tulu_hpc.rollout.weight_buckets import Bucket, buckets

PLUGIN = Path(__file__).parents[2] / "tulu_hpc" / "rollout" / "vllm_plugin" / "tulu_hpc_vllm"


def plugin_module(name: str) -> ModuleType:
    """A module of the plugin that needs no vLLM."""
    spec = importlib.util.spec_from_file_location(name, PLUGIN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("limit", [8, 40, 41, 10_000])
def test_buckets_hold_all_bytes_in_order(limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (2, 5), (1,), (40,), (4, 4), (2,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32]
    tensors = [
        (f"t{i}", torch.randn(shape, generator=generator).to(dtype))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes))
    ]
    tensors[4] = ("t4", tensors[4][1].t())  # not contiguous
    found: list[tuple[str, Tensor]] = []
    for bucket in buckets(iter(tensors), limit):
        sizes = [dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in bucket.metadata]
        assert [part.numel() for part in bucket.parts] == sizes
        assert all(part.dtype == torch.uint8 and part.is_contiguous() for part in bucket.parts)
        assert sum(sizes) <= limit or len(bucket.metadata) == 1
        found += [
            (name, part.view(dtype).view(shape))
            for (name, dtype, shape), part in zip(bucket.metadata, bucket.parts, strict=True)
        ]
    assert [name for name, _ in found] == [name for name, _ in tensors]
    assert all(
        torch.equal(ours, theirs) and ours.dtype == theirs.dtype for (_, ours), (_, theirs) in zip(found, tensors)
    )


def test_tensors_are_sent_from_where_they_are() -> None:
    tensors = {str(number): torch.full((10,), float(number)) for number in range(9)}
    parts = [part for bucket in buckets(iter(tensors.items()), 80) for part in bucket.parts]
    assert [part.data_ptr() for part in parts] == [tensor.data_ptr() for tensor in tensors.values()]


def test_two_buckets_are_held_at_a_time() -> None:
    """One is being sent, one is being filled; whoever streams a model has no more of its tensors alive."""
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number in range(40):
            most = max(most, len(alive))
            tensor = torch.full((256,), float(number))
            alive.add(tensor.untyped_storage())
            yield str(number), tensor
            del tensor

    bucket: Bucket | None = None
    sizes = []
    for bucket in buckets(tensors(), 4096):
        sizes.append(sum(part.numel() for part in bucket.parts))
    del bucket
    assert sizes == [4096] * 10
    assert most == 8  # four tensors in each of two buckets


def test_received_bytes_are_not_overwritten() -> None:
    """A buffer is used again only when nothing made of it is left."""
    pool = plugin_module("host_buffers").HostBuffers()
    first = pool.take(1000)
    kept = first.fill_(1)[:8].view(torch.float32)
    address = first.data_ptr()
    del first
    second = pool.take(1000)
    second.fill_(2)
    assert second.data_ptr() != address and kept.view(torch.uint8).eq(1).all()
    del kept
    third = pool.take(500)  # a smaller one fits in
    assert third.data_ptr() == address and third.shape == (500,)
    del second, third
    assert pool.take(2000).shape == (2000,)


@pytest.mark.parametrize("tied", [False, True])
def test_the_plugin_knows_the_same_model(tied: bool) -> None:
    architecture = Architecture(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    expected = plugin_module("expected")
    config = SimpleNamespace(model_type="llama", **architecture.to_hf())
    assert expected.expected_shapes(config) == hf_shapes(architecture)
    with pytest.raises(ValueError, match="not gpt2"):
        expected.expected_shapes(SimpleNamespace(model_type="gpt2"))


def test_the_plugin_refuses() -> None:
    expected = plugin_module("expected")
    shapes = {"a": (2, 3), "b": (4,)}
    expected.check_announced(shapes, ["a", "b"], [[2, 3], [4]], set())
    for names, given, received, words in (
        (["c"], [[1]], set(), "no parameter c"),
        (["a"], [[3, 2]], set(), r"a has shape \[3, 2\], the served model wants \[2, 3\]"),
        (["b"], [[4]], {"b"}, "b was sent twice"),
    ):
        with pytest.raises(ValueError, match=words):
            expected.check_announced(shapes, names, given, received)
    expected.check_complete(shapes, {"a", "b"})
    with pytest.raises(ValueError, match="1 parameters were never sent: b"):
        expected.check_complete(shapes, {"a"})


def _weights() -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.zeros(4)


@pytest.mark.parametrize(
    ("answers", "words", "never"),
    [
        ({"is_paused": {"is_paused": False}, "pause": {}}, "not paused", "start_weight_update"),
        ({"is_paused": {"is_paused": True}, "pause": Status(500)}, "pause.*status 500", "start_weight_update"),
        (
            {"is_paused": {"is_paused": True}, "pause": {}, "get_world_size": {"world_size": 0}},
            "world size",
            "start_weight_update",
        ),
        (
            {
                "is_paused": {"is_paused": True},
                "pause": {},
                "get_world_size": {"world_size": 1},
                "init_weight_transfer_engine": Status(500, "no plugin"),
            },
            "status 500.*no plugin",
            "start_weight_update",
        ),
    ],
)
def test_an_update_that_cannot_begin(answers: dict[str, Any], words: str, never: str) -> None:
    """Nothing is sent, the server is never resumed, and this client asks it for nothing until it has new weights."""

    async def update() -> tuple[list[str], Any]:
        async with SmallServer(**answers) as server:
            engine = VllmEngine([server.address], vocab_size=50, sync_timeout_seconds=1.0)
            with pytest.raises(EngineError, match=words):
                await engine.update_weights(_weights(), 1)
            assert engine.serving() == []
            return [path for path, _ in server.requests], engine

    paths, _ = asyncio.run(update())
    assert f"/{never}" not in paths and "/resume" not in paths
    assert "/pause?mode=keep&clear_cache=true" in paths
