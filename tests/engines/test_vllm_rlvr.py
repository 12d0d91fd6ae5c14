"""rlvr on a real vLLM server: weights every step, a server killed on the way, and the verdicts of the mismatch gate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engines import vllm_server as real
from tests.parallel.forked import WorkerError, run_forked
from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import in_processes, metrics, rlvr_config
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.rollout.server import Server
from tulu_hpc.rollout.vllm import VllmEngine
from tulu_hpc.stages import rlvr, rlvr_rollouts, served

pytestmark = [real.needs_vllm, pytest.mark.timeout(450)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    folder = tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))
    real.write_model(folder, tied=False)
    return folder


@pytest.fixture(scope="module")
def server(inputs: Path) -> Iterator[Server]:
    found = real.start(inputs)
    yield found
    found.stop()


def config_of(inputs: Path, run: Path, **changes: Any) -> RlvrConfig:
    values = {
        "rollout__engine": "vllm",
        "rollout__temperature": 1.0,
        "rollout__vllm": {"python": str(real.PYTHON), "kv_cache_mib": 64, **changes.pop("vllm", {})},
    }
    return rlvr_config(inputs, run, **values | changes)


def _always_learn(config: RlvrConfig) -> None:
    """Every group gets advantages, so that weights change and log-probs are compared at every step."""
    rlvr_rollouts.group_advantages = lambda rewards, kind: [float(n % 2) - 0.5 for n in range(len(rewards))]
    rlvr.run(config)


def _with_a_murder(config: RlvrConfig) -> None:
    """kill -9 of the engine core and the API server when the second step has asked for its samples."""
    generate, calls = served.ServedEngine._generate, 0

    def deadly(self: Any, requests: Any, done: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            real.kill(self.own[0])
        return generate(self, requests, done)

    served.ServedEngine._generate = deadly  # type: ignore[method-assign]  # of this forked process only
    _always_learn(config)


def _left_behind(process: psutil.Process) -> bool:
    """A process of vLLM that this one has started, or whose parent is gone; not those of others on this machine."""
    try:
        chain = [each for each in (process, *process.parents()) if each.pid != 1]
        names = [str(each.cmdline()).lower() for each in chain]
    except psutil.NoSuchProcess:
        return False
    return "vllm" in names[0] and (os.getpid() in [each.pid for each in chain] or "vllm" in names[-1])


def test_a_server_killed_in_a_run(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two tensor-parallel ranks; the run ends as if nothing had happened, and leaves no process behind."""
    before = {process.pid for process in psutil.process_iter()}
    config = config_of(inputs, tmp_path / "run", parallel__tensor=2, train__steps=3)
    run_forked(2, _with_a_murder, config, timeout=400)  # two starts of vLLM
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["train/updates"] == 1 for row in rows)
    assert all(row["rollout/logprob_error_max"] < 1e-4 for row in rows)
    text = capfd.readouterr().out
    assert "rollout servers lost" in text and "was dead and has been started again" in text
    assert not [process for process in psutil.process_iter() if process.pid not in before and _left_behind(process)]


@pytest.mark.parametrize("sync", ["gloo", "checkpoint"])
def test_a_server_that_runs_already(inputs: Path, tmp_path: Path, server: Server, sync: str) -> None:
    """Two data-parallel ranks ask the same server; small buckets; it is still there afterwards."""
    vllm = {"servers": [str(server.address)], "sync": sync, "bucket_mib": 1}
    in_processes(_always_learn, config_of(inputs, tmp_path / "run", train__steps=3, vllm=vllm), world=2)
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3 and all(row["rollout/logprob_error_max"] < 1e-4 for row in rows)
    assert server.is_running() and not (tmp_path / "run" / "rollout" / "weights").exists()


def _wrong_sending(times: int, parameter: str = "lm_head.weight") -> Any:
    """Weights that are not the trainer's, the first `times` times."""

    def stage(config: RlvrConfig) -> None:
        real.send_wrong_weights(lambda call: call <= times, parameter)
        _always_learn(config)

    return stage


def _wrong_report(config: RlvrConfig, good: int = 0) -> None:
    """Log-probs that are not the samples', after the first `good` steps."""
    generate, calls = VllmEngine.generate, 0

    async def wrong(self: Any, requests: Any) -> Any:
        nonlocal calls
        calls += 1
        found = await generate(self, requests)
        for completion in found:
            completion.logprobs[0] -= 0.01 if calls > good else 0
        return found

    VllmEngine.generate = wrong  # type: ignore[method-assign]  # of this forked process only
    _always_learn(config)


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        (
            _wrong_sending(1),
            r"WEIGHTS: the engine held others .*lm_head\.weight of http://\S+ has another checksum",
        ),
        (_wrong_sending(1, "model.layers.1.mlp.up_proj.weight"), "WEIGHTS: sent anew they agree .*were right"),
        (_wrong_report, "SAMPLING TRANSFORM.*were right"),
        (_wrong_sending(9), "KERNEL NUMERICS.*were right"),
    ],
    ids=["checksums", "packed", "sampling", "numerics"],
)
def test_verdicts(inputs: Path, tmp_path: Path, server: Server, stage: Any, verdict: str) -> None:
    # A server that is taken for dead on a busy machine would get the weights a second time, and right ones then.
    vllm = {"servers": [str(server.address)], "probe_seconds": 60.0}
    config = config_of(inputs, tmp_path / "run", vllm=vllm)
    place = r"worst in sample \w+#\d at position \d of \d: token \d+, trainer -\S+, engine -\S+, worst positions 0-15 "
    with pytest.raises(WorkerError, match=f"MismatchError: step 1: .*{place}.*nothing was trained: {verdict}"):
        in_processes(stage, config)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_verdict_after_training(inputs: Path, tmp_path: Path, server: Server) -> None:
    """From the second step on the comparison comes with the update: the weights sent for the verdict are new ones."""
    vllm = {"servers": [str(server.address)], "probe_seconds": 60.0}
    config = config_of(inputs, tmp_path / "run", vllm=vllm)
    words = "MismatchError: step 2: .*the step was trained, but is not saved: SAMPLING TRANSFORM"
    with pytest.raises(WorkerError, match=words):
        in_processes(lambda config: _wrong_report(config, good=1), config)
    assert len(metrics(tmp_path / "run")) == 1


def test_no_server_there(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path / "run", vllm={"servers": ["http://127.0.0.1:9"], "start_seconds": 1.0})
    with pytest.raises(WorkerError, match=r"no vLLM server is left: http://127\.0\.0\.1:9: does not answer within 1 s"):
        in_processes(rlvr.run, config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout__temperature": 0.7, "rollout__top_p": 0.9}, "renormalised"),
        ({"vllm": {"servers": ["http://8.8.8.8:1"]}}, "not a private address"),
        ({"vllm": {"servers": ["10.0.0.1"]}}, "need http"),
    ],
)
def test_refused_settings(inputs: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rlvr.check(config_of(inputs, tmp_path / "run", **changes))
