"""The vLLM engine on a real server: log-probs, weight updates over gloo and files, and what happens when things break.

fp32, so that the engine's log-probs can be held against those of transformers to 1e-4.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.engines import vllm_server as real
from tests.engines.slurm_cluster import wait_for
from tests.parallel.forked import WorkerError, run_forked
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.build import build_model
from tulu_hpc.models.convert import iter_hf_tensors, load_hf, save_hf
from tulu_hpc.parallel.layout import Layout, initialize
from tulu_hpc.rollout.engine import Completion, EngineError, Request, Sampling, ServersLostError
from tulu_hpc.rollout.server import Server
from tulu_hpc.rollout.vllm import VllmEngine

pytestmark = [real.needs_vllm, pytest.mark.timeout(300)]
LIMIT = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def shape(folder: Path) -> Architecture:
    return real.write_model(folder, tied=True)


@pytest.fixture(scope="module")
def server(folder: Path, shape: Architecture) -> Iterator[Server]:
    found = real.start(folder)
    yield found
    found.stop()


@pytest.fixture
def engine(server: Server, shape: Architecture) -> VllmEngine:
    return engine_of(server, shape)


def engine_of(server: Server, shape: Architecture) -> VllmEngine:
    return VllmEngine(
        [server.address],
        vocab_size=shape.vocab_size,
        own=[server],
        bucket_bytes=20_000,
        sync_timeout_seconds=20.0,
    )


@pytest.fixture
def model(folder: Path, shape: Architecture) -> Any:
    return real.hf_model(folder)


def requests(count: int, tokens: int = 24, **options: Any) -> list[Request]:
    sampling = Sampling(tokens, **options)
    return [Request([5 + n % 3, 9, 30 + n // 4], sampling, seed=n << 58 | n, id=str(n)) for n in range(count)]


def sync(engine: VllmEngine, model: Any, version: int) -> None:
    asyncio.run(engine.update_weights(iter(real.state(model)), version))


def difference(engine: VllmEngine, model: Any, **options: Any) -> float:
    asked = requests(12, **options)
    return real.largest_difference(model, asked, asyncio.run(engine.generate(asked)))


def test_updates_reach_the_engine(engine: VllmEngine, model: Any) -> None:
    """Also the tied head, of which vLLM's CPU kernels keep a copy."""
    for version in (1, 2, 3):
        real.perturb(model, version)
        sync(engine, model, version)
        asked = requests(12)
        found = asyncio.run(engine.generate(asked))
        assert real.largest_difference(model, asked, found) < LIMIT
        assert all(each.policy_version == version for each in found)
    assert asyncio.run(engine.health())["policy_version"] == {str(engine.addresses[0]): 3}


def test_an_update_from_files(engine: VllmEngine, model: Any, tmp_path: Path) -> None:
    real.perturb(model, 7)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    asyncio.run(engine.load_checkpoint(tmp_path / "hf", 4))
    assert difference(engine, model) < LIMIT


def test_sampling(engine: VllmEngine, model: Any) -> None:
    """Greedy, nucleus, seeds and what ends an answer; and the endpoint of older servers gives the same."""
    sync(engine, model, 5)
    greedy = requests(3, temperature=0.0)
    found = asyncio.run(engine.generate(greedy))
    assert real.largest_difference(model, greedy, found) < LIMIT
    for request, completion in zip(greedy, found, strict=True):
        logits = model(torch.tensor([[*request.token_ids, *completion.token_ids]])).logits[0]
        assert logits.argmax(-1)[len(request.token_ids) - 1 : -1].tolist() == completion.token_ids
    assert difference(engine, model, top_p=0.5) < LIMIT

    asked = [Request([5, 9], Sampling(24), seed=3) for _ in range(2)] + [Request([5, 9], Sampling(24), seed=4)]
    same, again, other = asyncio.run(engine.generate(asked))
    assert same.token_ids == again.token_ids != other.token_ids
    stop = same.token_ids[10]
    first = same.token_ids.index(stop)
    (stopped,) = asyncio.run(engine.generate([Request([5, 9], Sampling(24, stop_token_ids=(stop,)), seed=3)]))
    assert stopped.token_ids == same.token_ids[: first + 1] and stopped.stop_reason == stop

    engine.pool.remotes[0].has_generate = False
    (older,) = asyncio.run(engine.generate(asked[:1]))
    assert older.token_ids == same.token_ids and older.policy_version == 5
    assert torch.allclose(torch.tensor(older.logprobs), torch.tensor(same.logprobs), atol=LIMIT, rtol=0)


def test_scores(engine: VllmEngine, model: Any) -> None:
    sync(engine, model, 6)
    tokens = [5, 9, 30, 44, 7, 61]
    (scores,) = asyncio.run(engine.score([tokens]))
    assert (torch.tensor(scores) - real.logprobs(model, tokens[:1], tokens[1:])).abs().max() < LIMIT


def test_requests_live_through_an_update(engine: VllmEngine, folder: Path, model: Any) -> None:
    """Each token's log-prob is of the weights that its span names, before the update and after."""
    new = real.hf_model(folder)
    real.perturb(new, 11)
    sync(engine, model, 20)
    asked = requests(6, tokens=400)

    async def both() -> list[Completion]:
        generation = asyncio.create_task(engine.generate(asked))
        # The update begins once all requests are at the server; it takes them seconds.
        while sum(remote.in_flight for remote in engine.pool.remotes) < len(asked):
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        await engine.update_weights(iter(real.state(new)), 21)
        return await generation

    found = asyncio.run(both())
    assert any(len(each.version_spans) == 2 for each in found)
    for request, completion in zip(asked, found, strict=True):
        assert len(completion.token_ids) == 400
        for span in completion.version_spans:
            weights = {20: model, 21: new}[span.version]
            ours = real.logprobs(weights, request.token_ids, completion.token_ids)[span.start : span.end]
            assert (ours - torch.tensor(completion.logprobs[span.start : span.end])).abs().max() < LIMIT


def _incomplete(model: Any) -> list[tuple[str, Tensor]]:
    return real.state(model)[:-2]


def _wrong_shape(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, value[:-1] if name.endswith("k_proj.weight") else value) for name, value in real.state(model)]


def _unknown(model: Any) -> list[tuple[str, Tensor]]:
    return [*real.state(model), ("model.extra", torch.zeros(2))]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (_incomplete, "2 parameters were never sent"),
        (_wrong_shape, r"k_proj\.weight has shape \[63, 64\], the served model wants \[64, 64\]"),
        (_unknown, "no parameter model.extra"),
    ],
)
def test_a_refused_update_is_repaired_by_the_next(engine: VllmEngine, model: Any, broken: Any, words: str) -> None:
    sync(engine, model, 30)
    real.perturb(model, 12)
    with pytest.raises(EngineError, match=words):
        asyncio.run(engine.update_weights(iter(broken(model)), 31))
    assert engine.serving() == []
    sync(engine, model, 32)
    assert difference(engine, model) < LIMIT


@pytest.mark.parametrize("when", ["after the start", "between buckets"])
def test_a_trainer_killed_in_an_update(server: Server, shape: Architecture, model: Any, when: str) -> None:
    """The next trainer gives the half-finished update up, sends everything anew and the server serves again."""

    def die() -> None:
        def tensors() -> Iterator[tuple[str, Tensor]]:
            for number, entry in enumerate(real.state(model)):
                if number == (0 if when == "after the start" else 12):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield entry

        asyncio.run(engine_of(server, shape).update_weights(tensors(), 40))

    sync(engine_of(server, shape), model, 39)
    with pytest.raises(WorkerError, match="killed"):
        run_forked(1, die)
    real.perturb(model, 13)
    engine = engine_of(server, shape)
    sync(engine, model, 41)
    assert difference(engine, model) < LIMIT


def test_weights_of_a_parallel_model(server: Server, shape: Architecture, folder: Path, tmp_path: Path) -> None:
    """tensor 2 x pipeline 2: shards of four ranks become the engine's weights, and no rank holds the whole model."""

    def send() -> float:
        groups = initialize(Layout(tensor=2, pipeline=2), seed=0)
        chunks = build_model(shape, groups)
        load_hf(chunks, folder / "model", shape, groups)
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.1)  # on all ranks alike, so also what several of them hold
        save_hf(chunks, tmp_path / "hf", shape, groups, source=folder / "model")
        stream = iter_hf_tensors(chunks, shape, groups)
        worst = 0.0
        if groups.is_main:
            engine = engine_of(server, shape)
            asyncio.run(engine.update_weights(((name, t) for name, t in stream if t is not None), 50))
            from transformers import AutoModelForCausalLM

            worst = difference(engine, AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32))
        for _ in stream:
            pass
        return worst

    assert 0 < run_forked(4, send, timeout=120)[0] < LIMIT


def test_a_server_killed_while_it_generates(engine: VllmEngine, server: Server, model: Any) -> None:
    """kill -9 of the API server: its engine core dies too; started again, it takes weights and the missing requests."""
    sync(engine, model, 60)
    before = real.processes(server)
    assert len(before) >= 3
    asked = requests(24, tokens=300)

    async def with_a_murder() -> list[Completion]:
        generation = asyncio.create_task(engine.generate(asked))
        while sum(remote.in_flight for remote in engine.pool.remotes) < len(asked):
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        before[1].kill()
        return await generation

    with pytest.raises(
        ServersLostError, match=rf"no vLLM server is left for request '\d+': .*{server.address}"
    ) as caught:
        asyncio.run(with_a_murder())
    wait_for(lambda: not any(_lives(process) for process in before[1:]), 20, "processes of the dead server", 0.05)
    assert asyncio.run(engine.revive()) == [str(server.address)]
    sync(engine, model, 61)
    done = dict(caught.value.completions)
    missing = [index for index in range(len(asked)) if index not in done]
    found = asyncio.run(engine.generate([asked[index] for index in missing]))
    done.update(zip(missing, found, strict=True))
    assert missing and real.largest_difference(model, asked, [done[index] for index in range(len(asked))]) < LIMIT


def test_an_engine_core_that_hangs(server: Server, shape: Architecture, model: Any) -> None:
    """SIGSTOP: the API server answers /health as ever, and the probe tells."""
    engine = engine_of(server, shape)
    engine.pool.probe_seconds = 1.0
    sync(engine, model, 70)
    core = max(real.processes(server)[2:], key=lambda process: process.memory_info().rss)
    core.suspend()
    try:
        with pytest.raises(ServersLostError, match=r"does not answer any more|no vLLM server is left"):
            asyncio.run(engine.generate(requests(4, tokens=100)))
    finally:
        core.resume()
    sync(engine, model, 71)
    assert difference(engine, model) < LIMIT


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
