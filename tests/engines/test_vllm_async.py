"""rlvr one step ahead on a real vLLM server: kill -9 of the trainer and of the server, weights in flight."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engines import vllm_server as real
from tests.parallel.forked import WorkerError, run_forked
from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import metrics, rlvr_config
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.rollout.server import Server
from tulu_hpc.stages import rlvr, rlvr_ahead, rlvr_rollouts
from tulu_hpc.stages.rlvr_buffer import Journal, journals

pytestmark = [real.needs_vllm, pytest.mark.timeout(450)]
STEPS, PROMPTS, SAMPLES = 5, 6, 4


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
        "async__max_staleness": 1,
        "rollout__engine": "vllm",
        "rollout__temperature": 1.0,
        "rollout__max_new_tokens": 24,
        "rollout__vllm": {"python": str(real.PYTHON), "kv_cache_mib": 64, **changes.pop("vllm", {})},
        "train__steps": STEPS,
        "train__async_save": False,
        "rlvr__prompts_per_step": PROMPTS,
        "rlvr__samples_per_prompt": SAMPLES,
    }
    return rlvr_config(inputs, run, **values | changes)


def _always_learn(config: RlvrConfig, actions: dict[int, Any] | None = None) -> None:
    """Every group gets advantages, so that weights change at every step; `actions` between a step's samples and its
    training."""
    rlvr_rollouts.group_advantages = lambda rewards, kind: [float(n % 2) - 0.5 for n in range(len(rewards))]
    go_on = rlvr_ahead.Ahead.go_on

    def acting(self: Any, at: int, position: int) -> None:
        go_on(self, at, position)
        if actions and at in actions:
            actions[at](self)

    rlvr_ahead.Ahead.go_on = acting  # type: ignore[method-assign]  # of this forked process only
    rlvr.run(config)


def trained(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "buffer" / "trained.jsonl").read_text().splitlines()]


def ids(run: Path) -> list[tuple[int, int, int]]:
    """(step, prompt, sample) of everything that was trained on."""
    return [(row["step"], sample[0], sample[2]) for row in trained(run) for sample in row["samples"]]


ALL_IDS = [(step, p, s) for step in range(1, STEPS + 1) for p in range(PROMPTS) for s in range(SAMPLES)]


def digests(run: Path) -> dict[Any, str]:
    """Of the samples in the journals."""
    files = journals(run / "buffer")
    header = json.loads(files[0].read_text().splitlines()[0].partition(" ")[2])
    found = Journal(run / "buffer", 99, header["identity"]).replay(after=0)
    return {(key.step, key.number, key.sample): sample.digest() for key, sample in found.items()}


def test_trainer_killed(inputs: Path, server: Server, tmp_path: Path) -> None:
    """kill -9 in step 4 with step 5 under way, restart: what was finished is trained on, every sample once."""
    config = config_of(inputs, tmp_path / "run", vllm={"servers": [str(server.address)]})

    def die(ahead: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerError, match="died without a word"):
        run_forked(1, _always_learn, config, {4: die})
    kept = digests(tmp_path / "run")
    assert {step for step, _, _ in kept} >= {1, 2, 3, 4}
    run_forked(1, _always_learn, config)
    assert ids(tmp_path / "run") == ALL_IDS
    found = {(row["step"], each[0], each[2]): each[4] for row in trained(tmp_path / "run") for each in row["samples"]}
    assert all(found[key] == digest for key, digest in kept.items())
    rows = metrics(tmp_path / "run")
    assert [row["rollout/staleness_max"] for row in rows[:3]] == [0, 1, 1]
    assert all(row["rollout/staleness_max"] <= 1 for row in rows)
    assert all(row["rollout/logprob_error_max"] < 1e-4 for row in rows)


def test_wrong_weights_are_noticed(inputs: Path, server: Server, tmp_path: Path) -> None:
    """No sample of step 2 was drawn by the weights that it trains; the gate has the engine score some with them."""

    def stage(config: RlvrConfig) -> None:
        real.send_wrong_weights(lambda call: call == 2)
        _always_learn(config)

    config = config_of(inputs, tmp_path / "run", vllm={"servers": [str(server.address)], "probe_seconds": 60.0})
    with pytest.raises(WorkerError, match=r"MismatchError: step 2: .*nothing was trained: WEIGHTS: the engine held"):
        run_forked(1, stage, config)
    assert len(metrics(tmp_path / "run")) == 1


def test_server_killed(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """kill -9 of engine core and API server while they answer step 3 and step 2 trains: started again, and only what
    was not finished is asked for again."""

    def murder(ahead: Any) -> None:
        if ahead.learner.run.groups.is_main:
            real.kill(ahead.engine.own[0])

    before = {process.pid for process in psutil.process_iter()}
    config = config_of(inputs, tmp_path / "run", parallel__tensor=2)
    run_forked(2, _always_learn, config, {2: murder}, timeout=400)  # two starts of vLLM
    assert ids(tmp_path / "run") == ALL_IDS
    assert "was dead and has been started again" in capfd.readouterr().out
    ours = (p for p in psutil.process_iter(["cmdline"]) if str(inputs) in str(p.info["cmdline"]))
    left = [p for p in ours if p.pid not in before]
    assert not left


def test_weights_in_flight(inputs: Path, server: Server, tmp_path: Path) -> None:
    """Two replicas; updates reach servers that answer; every token is noted with the weights that drew it."""
    config = config_of(
        inputs,
        tmp_path / "run",
        vllm={"servers": [str(server.address)]},
        async__update="in_flight",
        rollout__max_sequences=32,
        rollout__max_new_tokens=300,
        optimizer__lr=1e-3,
        train__pack_rows=512,
        train__save_every=None,
    )
    run_forked(2, _always_learn, config)
    assert ids(tmp_path / "run") == ALL_IDS
    files = journals(tmp_path / "run" / "buffer")
    header = json.loads(files[0].read_text().splitlines()[0].partition(" ")[2])
    samples = Journal(tmp_path / "run" / "buffer", 99, header["identity"]).replay(after=0)
    spans = [sample.completion.version_spans for sample in samples.values()]
    assert any(len(each) > 1 for each in spans), "no request lived through an update"
    rows = metrics(tmp_path / "run")
    assert max(row["rollout/staleness_max"] for row in rows) == 1
    # On scores of what was finished, or on the tokens that the new weights drew of what was not.
    assert all(row["rollout/logprob_error_max"] < 1e-4 for row in rows)
