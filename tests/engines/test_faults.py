"""Each fault alone on a real vLLM server: what is told of it, and that nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from tests.engines import faults
from tests.engines import vllm_server as real
from tests.engines.faults import Host, Proxies, Schedule
from tests.engines.slurm_cluster import wait_for
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.rollout.engine import Completion, EngineError, Request, Sampling
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.server import Server
from tulu_hpc.rollout.vllm import VllmEngine

pytestmark = [real.needs_vllm, pytest.mark.timeout(300)]
LIMIT = 1e-4
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def shape(folder: Path) -> Architecture:
    return real.write_model(folder, tied=False)


@pytest.fixture(scope="module")
def server(folder: Path, shape: Architecture) -> Iterator[Server]:
    found = real.start(folder)
    yield found
    found.stop()


@pytest.fixture
def model(folder: Path) -> Any:
    return real.hf_model(folder)


def engine_of(address: Address, shape: Architecture, **options: Any) -> VllmEngine:
    values = {"bucket_bytes": 20_000, "sync_timeout_seconds": 20.0, "probe_seconds": 2.0} | options
    return VllmEngine([address], vocab_size=shape.vocab_size, **values)


def requests(count: int, tokens: int = 24) -> list[Request]:
    return [Request([5 + n % 3, 9, 30 + n // 4], Sampling(tokens), seed=n << 58 | n, id=f"s{n}") for n in range(count)]


def sync(engine: VllmEngine, model: Any, version: int) -> None:
    asyncio.run(engine.update_weights(iter(real.state(model)), version))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (faults.BREAK_OFF, r"POST {server}/inference/v1/generate: (0 bytes read|.*reset)"),
        (faults.LOSE, r"POST {server}/inference/v1/generate: (0 bytes read|.*reset)"),
        (faults.TRUNCATE, r"POST {server}/inference/v1/generate: \d+ bytes read on a total of \d+"),
        (faults.GARBAGE, r"POST {server}/inference/v1/generate: the answer is not JSON: '<html>bad gateway"),
        (faults.SHAPES, r"{server}: 24 tokens, but 23 log-probs"),
        (faults.UNFINISHED, r"{server}: finish_reason None: the answer is not finished"),
        (faults.ERROR, r"POST {server}/inference/v1/generate: status 500: .*EngineCore encountered an issue"),
        (faults.BUSY, r"POST {server}/inference/v1/generate: status 503: .*overloaded"),
        (faults.LATE, r"POST {server}/inference/v1/generate: no complete answer within 3 s"),
        (faults.OLD, r"{server}: an answer to '.*tulu-s\d-.*' instead of 'tulu-s\d-"),
    ],
)
def test_a_bad_answer(server: Server, shape: Architecture, model: Any, fault: str, words: str) -> None:
    """The request is made again, and yields one sample with the log-probs of the model."""
    sync(engine_of(server.address, shape), model, 1)
    schedule = Schedule([fault], 0)
    asked, found = requests(6), []
    with Proxies([Host(server)], schedule) as proxies:
        deadline = 3.0 if fault == faults.LATE else 60.0
        engine = engine_of(proxies.addresses[0], shape, max_in_flight=1, deadline_seconds=deadline)

        async def run() -> None:
            async for place, completion in engine.generate_stream(asked):
                found.append((place, completion))

        asyncio.run(run())
    assert schedule.left == 0 and engine.retries == 1 and engine.late_answers == (fault == faults.OLD)
    assert sorted(place for place, _ in found) == list(range(6))
    assert real.largest_difference(model, asked, [completion for _, completion in sorted(found, key=_place)]) < LIMIT
    (incident,) = engine.take_incidents()
    pattern = words.replace("{server}", re.escape(str(proxies.addresses[0])))
    assert re.match(rf"attempt tulu-s\d-[0-9a-f]+-1 failed: {pattern}", incident), incident


def _place(entry: tuple[int, Completion]) -> int:
    return entry[0]


@pytest.mark.parametrize("fault", [faults.BREAK_UPDATE, faults.REFUSE_UPDATE])
def test_an_update_that_breaks_off(server: Server, shape: Architecture, model: Any, fault: str) -> None:
    """The server gets no requests until a full update has come through; then it has the new weights."""
    schedule = Schedule([fault], 1)
    with Proxies([Host(server)], schedule) as proxies:
        address = proxies.addresses[0]
        engine = engine_of(address, shape)
        real.perturb(model, 3)
        with pytest.raises(EngineError, match=rf"no vLLM server took the weights 5: .*{address}.*") as caught:
            sync(engine, model, 5)
        print(caught.value)
        assert engine.serving() == [] and asyncio.run(engine.torn()) == engine.missing() != []
        assert _ask(server, "/weight_info")["weight_version"] == "dirty" and _ask(server, "/is_paused")["is_paused"]
        asyncio.run(engine.update_weights(iter(real.state(model)), 5, only_missing=True))
        asked = requests(6)
        assert real.largest_difference(model, asked, asyncio.run(engine.generate(asked))) < LIMIT
        assert asyncio.run(engine.torn()) == []


def test_paused_and_dirty_while_it_lasts(server: Server, shape: Architecture, model: Any) -> None:
    """Requests are frozen and no version is claimed until the last parameter is there."""
    seen = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for entry in real.state(model):
            seen.append((_ask(server, "/is_paused")["is_paused"], _ask(server, "/weight_info")["weight_version"]))
            yield entry

    asyncio.run(engine_of(server.address, shape).update_weights(tensors(), 8))
    assert set(seen[1:]) == {(True, "dirty")}
    assert not _ask(server, "/is_paused")["is_paused"] and _ask(server, "/weight_info")["weight_version"] == "8"


def _ask(server: Server, path: str) -> Any:
    with urllib.request.urlopen(f"{server.address}{path}", timeout=10) as answer:
        return json.load(answer)


def test_an_update_under_streams(server: Server, shape: Architecture, folder: Path, model: Any) -> None:
    """A server that does not report versions: the client cuts where no token came, exactly."""
    new = real.hf_model(folder)
    real.perturb(new, 11)
    engine = engine_of(server.address, shape)
    sync(engine, model, 20)
    engine.pool.remotes[0].has_generate = False
    asked = requests(6, tokens=400)

    async def both() -> list[Completion]:
        generation = asyncio.create_task(engine.generate(asked))
        while sum(remote.in_flight for remote in engine.pool.remotes) < len(asked):
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        await engine.update_weights(iter(real.state(new)), 21)
        return await generation

    found = asyncio.run(both())
    assert any(len(each.version_spans) == 2 for each in found)
    for request, completion in zip(asked, found, strict=True):
        for span in completion.version_spans:
            weights = {20: model, 21: new}[span.version]
            ours = real.logprobs(weights, request.token_ids, completion.token_ids)[span.start : span.end]
            worst = max(abs(a - b) for a, b in zip(ours.tolist(), completion.logprobs[span.start : span.end]))
            assert worst < LIMIT


def test_a_server_killed_in_an_update(server: Server, shape: Architecture, model: Any) -> None:
    """A bucket is on its way. The message names the server; started again, it takes everything."""
    schedule = Schedule([faults.KILL_IN_UPDATE], 2)
    with Proxies([Host(server)], schedule) as proxies:
        engine = engine_of(proxies.addresses[0], shape, start_seconds=120.0)
        with pytest.raises(EngineError, match=rf"no vLLM server took the weights 9: .*{proxies.addresses[0]}"):
            sync(engine, model, 9)
        assert asyncio.run(engine.revive()) == []  # not ours: waited for
        real.perturb(model, 5)
        sync(engine, model, 9)
        asked = requests(6)
        assert real.largest_difference(model, asked, asyncio.run(engine.generate(asked))) < LIMIT


def test_no_orphan_of_a_killed_trainer(folder: Path, shape: Architecture, tmp_path: Path) -> None:
    """kill -9 of the process that started the server: API server and engine core end too."""
    code = f"""
import asyncio, signal
from pathlib import Path
from tests.engines import vllm_server as real
server = real.start(Path({str(folder)!r}))
print(server.pid, flush=True)
signal.pause()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
    assert trainer.stdout is not None
    supervisor = psutil.Process(int(trainer.stdout.readline()))
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) >= 3
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not any(_lives(process) for process in family), 20, "the server outlives its trainer", 0.05)


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
