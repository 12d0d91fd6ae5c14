"""Rollouts ahead of training: which weights draw which step, and that no kill loses or doubles a finished sample.

The engine is `small_server.py`, a process behind vLLM's endpoints whose samples depend on every bit of the weights it
was sent; its log-probs are of no model, so the mismatch gate is off here. Real vLLM: tests/engines/test_vllm_async.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.parallel.forked import WorkerError, run_forked
from tests.rlvr import tiny_ppo, tiny_rlvr
from tests.rlvr.tiny_rlvr import metrics, rlvr_config, same_metrics
from tulu_hpc.config.loader import ConfigError, dump_yaml, load_config
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.rollout.http import Address, request
from tulu_hpc.stages import rlvr, rlvr_ahead, rlvr_producer, rlvr_step
from tulu_hpc.stages.rlvr_buffer import Journal, Sample, journals
from tulu_hpc.training.checkpoint import valid_steps

STEPS, PROMPTS, SAMPLES = 5, 6, 4


class SmallServer:
    def __init__(self, model: Path) -> None:
        tokenizer = load_tokenizer(str(model))
        command = [sys.executable, str(Path(__file__).with_name("small_server.py"))]
        self.process = subprocess.Popen(
            [*command, str(tokenizer.eos_token_id), str(len(tokenizer))], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = Address("127.0.0.1", int(self.process.stdout.readline()))

    def tempo(self, **values: Any) -> None:
        """See `small_server`."""
        asyncio.run(request(self.address, "POST", "/tempo", values, seconds=10))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def running(inputs: Path) -> Iterator[SmallServer]:
    found = SmallServer(inputs / "model")
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture
def server(running: SmallServer) -> Iterator[SmallServer]:
    yield running
    running.tempo()


def config_of(inputs: Path, run: Path, *servers: SmallServer, **changes: Any) -> RlvrConfig:
    values: dict[str, Any] = {
        "async__max_staleness": 1,
        "rollout__engine": "vllm",
        "rollout__temperature": 1.0,
        "rollout__mismatch_max": 1e9,
        "rollout__mismatch_mult_prob_error": 1e9,
        "rollout__vllm": {"servers": [str(each.address) for each in servers], "sync": "checkpoint"},
        "train__steps": STEPS,
        "train__async_save": False,
        "rlvr__prompts_per_step": PROMPTS,
        "rlvr__samples_per_prompt": SAMPLES,
    }
    return rlvr_config(inputs, run, **values | changes)


@pytest.fixture(scope="module")
def whole(inputs: Path, running: SmallServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, one step ahead."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_forked(1, rlvr.run, config_of(inputs, run, running, train__keep_last=99))
    return run


def trained(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "buffer" / "trained.jsonl").read_text().splitlines()]


def ids(run: Path) -> list[tuple[int, int, int, int]]:
    """(step, prompt, round, sample) of everything that was trained on."""
    return [(row["step"], *sample[:3]) for row in trained(run) for sample in row["samples"]]


ALL_IDS = [
    (step, number, 0, sample) for step in range(1, STEPS + 1) for number in range(PROMPTS) for sample in range(SAMPLES)
]


def journal_samples(run: Path) -> list[Sample]:
    files = journals(run / "buffer")
    header = json.loads(files[0].read_text().splitlines()[0].partition(" ")[2])
    return list(Journal(run / "buffer", 99, header["identity"]).replay(after=0).values())


def versions(run: Path) -> dict[int, set[int]]:
    """Step -> the weights that drew its tokens."""
    found: dict[int, set[int]] = {}
    for sample in journal_samples(run):
        found.setdefault(sample.key.step, set()).update(span.version for span in sample.completion.version_spans)
    return found


def test_one_step_ahead(whole: Path) -> None:
    """Step n is drawn by the weights after step n - 2, whatever the timing; steps 1 and 2 by the first."""
    rows = metrics(whole)
    assert [row["train/updates"] for row in rows] == [1] * STEPS
    assert [row["weights"] for row in trained(whole)] == [0, 1, 2, 3, 4]
    assert versions(whole) == {5: {3}}  # the earlier ones are pruned
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1, 1, 1]
    assert ids(whole) == ALL_IDS


def test_buffer_is_pruned(whole: Path) -> None:
    """Checkpoints of steps 2, 4 and 5: what that of 4 covers is gone."""
    assert valid_steps(whole / "checkpoints") == [2, 4, 5]
    assert {path.name for path in journals(whole / "buffer")} == {"step_5.replica_0.journal"}
    state = json.loads((whole / "checkpoints" / "step_4" / "trainer_state.json").read_text())
    assert state["extra"]["buffer"] == {"step": 4, "samples": 4 * PROMPTS * SAMPLES}


@pytest.mark.parametrize("world", [1, 2])
def test_two_steps_ahead(inputs: Path, server: SmallServer, tmp_path: Path, world: int) -> None:
    config = config_of(inputs, tmp_path / "run", server, async__max_staleness=2, train__save_every=None)
    run_forked(world, rlvr.run, config)
    assert versions(tmp_path / "run") == {1: {0}, 2: {0}, 3: {0}, 4: {1}, 5: {2}}
    assert [row["rollout/staleness_max"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 2, 2]
    assert ids(tmp_path / "run") == ALL_IDS


def _before_training(actions: dict[int, Callable[[Any], None]]) -> Callable[[RlvrConfig], Any]:
    """The stage, with actions on its `Ahead` between taking a step's samples and training on them, by step."""

    def stage(config: RlvrConfig) -> Any:
        go_on = rlvr_ahead.Ahead.go_on

        def acting(self: Any, at: int, position: int) -> None:
            go_on(self, at, position)
            if at in actions:
                actions[at](self)

        rlvr_ahead.Ahead.go_on = acting  # type: ignore[method-assign]  # of this forked process only
        return rlvr.run(config)

    return stage


def _die(ahead: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_when_all_is_there(ahead: Any) -> None:
    assert ahead.producer.wait() is None
    _die(ahead)


def test_killed_with_the_next_steps_in_the_buffer(
    inputs: Path, server: SmallServer, whole: Path, tmp_path: Path
) -> None:
    """kill -9 in step 4: steps 3, 4 and 5 are in the buffer. The resumed run is the uninterrupted one, bit for bit."""
    config = config_of(inputs, tmp_path / "run", server)
    with pytest.raises(WorkerError, match="died without a word"):
        run_forked(1, _before_training({4: _die_when_all_is_there}), config)
    assert valid_steps(tmp_path / "run" / "checkpoints") == [2]
    server.tempo(hold=0)  # nothing is asked for again
    run_forked(1, rlvr.run, config)
    assert same_metrics(tmp_path / "run") == same_metrics(whole)
    assert trained(tmp_path / "run") == trained(whole)


@pytest.mark.parametrize(("world", "finished"), [(1, 7), (2, 13)])
def test_killed_in_the_middle_of_the_next_step(
    inputs: Path, server: SmallServer, whole: Path, tmp_path: Path, world: int, finished: int
) -> None:
    """kill -9 of all trainers when some samples of step 4 are finished: those are trained on, the others made."""

    def hold(ahead: Any) -> None:
        ahead._everywhere(lambda producer: producer.wait())
        if ahead.learner.run.groups.is_main:
            server.tempo(hold=finished)
        ahead._everywhere(lambda producer: None)

    def stage(config: RlvrConfig) -> Any:
        go_on, finish = rlvr_ahead.Ahead.go_on, rlvr_producer.Producer._finish
        noted = 0

        def acting(self: Any, at: int, position: int) -> None:
            go_on(self, at, position)
            if at == 2:
                hold(self)

        def counting(self: Any, answers: Any) -> None:
            nonlocal noted
            finish(self, answers)
            noted += sum(job.key.step == 4 for job, _ in answers)
            if noted and (noted == finished or world == 2):
                _die(self)

        rlvr_ahead.Ahead.go_on = acting  # type: ignore[method-assign]  # of this forked process only
        rlvr_producer.Producer._finish = counting  # type: ignore[method-assign]
        return rlvr.run(config)

    config = config_of(inputs, tmp_path / "run", server)
    with pytest.raises(WorkerError, match="died without a word"):
        run_forked(world, stage, config)
    kept = {sample.key: sample.digest() for sample in journal_samples(tmp_path / "run")}
    some = Counter(key.step for key in kept)
    assert some[3] == PROMPTS * SAMPLES and 0 < some[4] <= finished and (world == 2 or some[4] == finished)
    server.tempo()
    run_forked(world, rlvr.run, config)
    assert ids(tmp_path / "run") == ids(whole) == ALL_IDS
    digests = {(row["step"], *sample[:3]): sample[4] for row in trained(tmp_path / "run") for sample in row["samples"]}
    for key, digest in kept.items():
        assert digests[key.step, key.number, key.extra_round, key.sample] == digest, key
    assert all(row["rollout/staleness_max"] <= 1 for row in metrics(tmp_path / "run"))


def test_stopped_on_request(inputs: Path, server: SmallServer, whole: Path, tmp_path: Path) -> None:
    """SIGTERM while the next step is generated: saved, ended, and resumed to the same samples."""
    config = config_of(inputs, tmp_path / "run", server)
    with pytest.raises(WorkerError, match="Preempted"):
        run_forked(1, _before_training({3: lambda ahead: os.kill(os.getpid(), signal.SIGTERM)}), config)
    assert valid_steps(tmp_path / "run" / "checkpoints")[-1] == 4  # the signal came after step 3 had asked for it
    run_forked(1, rlvr.run, config)
    assert ids(tmp_path / "run") == ids(whole)


def test_training_does_not_wait_for_the_next_step(inputs: Path, server: SmallServer, tmp_path: Path) -> None:
    """The engine holds step 3 until step 2 is trained: a trainer that waited for it would wait for ever."""
    train, calls = rlvr_step.train_step, 0

    def hold(ahead: Any) -> None:
        assert ahead.producer.wait() is None
        server.tempo(hold=0)

    def releasing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        result = train(*args, **options)
        calls += 1
        if calls == 2:
            server.tempo()
        return result

    def stage(config: RlvrConfig) -> None:
        rlvr_step.train_step = releasing
        _before_training({1: hold})(config)

    run_forked(1, stage, config_of(inputs, tmp_path / "run", server, train__steps=3), timeout=60)
    assert len(metrics(tmp_path / "run")) == 3


def test_weights_in_flight(inputs: Path, server: SmallServer, tmp_path: Path) -> None:
    """Requests live through updates: answers with tokens of two versions, each noted, none older than allowed."""
    server.tempo(seconds=0.04)
    config = config_of(
        inputs, tmp_path / "run", server, async__update="in_flight", train__steps=4, train__save_every=None
    )
    run_forked(1, rlvr.run, config)
    spans = [sample.completion.version_spans for sample in journal_samples(tmp_path / "run")]
    assert any(len(each) == 2 for each in spans)
    assert all(later.version > earlier.version for each in spans for earlier, later in pairwise(each))
    assert max(row["rollout/staleness_max"] for row in metrics(tmp_path / "run")) == 1
    assert ids(tmp_path / "run") == [each for each in ALL_IDS if each[0] <= 4]


def test_a_dead_server_of_two(inputs: Path, tmp_path: Path) -> None:
    """kill -9 of a server with requests at it: the other one answers them, once."""
    servers = [SmallServer(inputs / "model") for _ in range(2)]
    try:

        def hold(ahead: Any) -> None:
            assert ahead.producer.wait() is None
            servers[0].tempo(hold=3)

        def murder(ahead: Any) -> None:
            os.kill(servers[0].process.pid, signal.SIGKILL)

        config = config_of(inputs, tmp_path / "run", *servers, train__save_every=None)
        run_forked(1, _before_training({1: hold, 2: murder}), config)
        assert ids(tmp_path / "run") == ALL_IDS
        servers[1].process.kill()
        vllm = {"servers": [str(each.address) for each in servers], "sync": "checkpoint", "start_seconds": 1.0}
        config = config_of(inputs, tmp_path / "none", rollout__vllm=vllm)
        with pytest.raises(WorkerError, match=r"EngineError: .*no vLLM server is left: http"):
            run_forked(2, rlvr.run, config)
    finally:
        for each in servers:
            each.process.kill()
            each.process.wait()


def test_a_dead_verifier(inputs: Path, server: SmallServer, whole: Path, tmp_path: Path) -> None:
    """kill -9 of the verifier's workers at every batch: their verdicts are asked for again, and none is lost."""

    def stage(config: RlvrConfig) -> None:
        verdicts = rlvr_producer.Producer._verdicts

        def murderous(self: Any, tasks: Any) -> Any:
            for process in psutil.Process().children(recursive=True):
                process.kill()
            return verdicts(self, tasks)

        rlvr_producer.Producer._verdicts = murderous  # type: ignore[method-assign]  # of this forked process only
        rlvr.run(config)

    run_forked(1, stage, config_of(inputs, tmp_path / "run", server, train__steps=2, verifier__max_lost_share=1e-9))
    for name in ("rollout/reward", "verifier/crashes"):
        assert [row[name] for row in metrics(tmp_path / "run")] == [row[name] for row in metrics(whole)[:2]]


def test_a_failure_beside_training_ends_all_ranks(inputs: Path, server: SmallServer, tmp_path: Path) -> None:
    """The engine's answers to step 2 are broken: both ranks say so, with the cause, and neither waits for ever."""
    server.tempo()

    def breaking(ahead: Any) -> None:
        ahead._everywhere(lambda producer: producer.wait())
        if ahead.learner.run.groups.is_main:
            server.tempo(broken=True)

    config = config_of(inputs, tmp_path / "run", server, parallel__tensor=2)
    with pytest.raises(WorkerError) as error:
        run_forked(2, _before_training({1: breaking}), config, timeout=60)
    cause = r"ProducerError: \[rank 0\] request .* failed 3 times: .*a token id outside the vocabulary"
    assert len(re.findall(cause, str(error.value))) == 2


def test_a_sample_that_is_too_old_is_made_again(inputs: Path, server: SmallServer, tmp_path: Path) -> None:
    """A buffer that holds a sample of step 4 drawn by the first weights: it is refused, counted, and drawn anew."""
    config = config_of(inputs, tmp_path / "run", server)
    with pytest.raises(WorkerError, match="died without a word"):
        run_forked(1, _before_training({3: _die_when_all_is_there}), config)
    (path,) = [each for each in journals(tmp_path / "run" / "buffer") if each.name.startswith("step_4")]
    identity = json.loads(path.read_text().splitlines()[0].partition(" ")[2])["identity"]
    journal = Journal(tmp_path / "run" / "buffer", 0, identity)
    samples = [each for each in journal.replay(after=3).values() if each.key.number == 2]
    journal.drop(each.key for each in samples)
    for each in samples:
        content = each.content() | {"version": 0, "spans": [[0, 0, len(each.completion.token_ids)]]}
        journal.append([Sample.from_content(content)])
    journal.close()
    run_forked(1, rlvr.run, config)
    assert [row["rollout/stale_refused"] for row in metrics(tmp_path / "run")] == [0, 0, 0, SAMPLES, 0]
    assert (
        ids(tmp_path / "run") == ALL_IDS and max(sample[3] for sample in trained(tmp_path / "run")[3]["samples"]) == 1
    )


@pytest.mark.parametrize("dies", [False, True])
def test_dynamic_sampling(inputs: Path, server: SmallServer, tmp_path: Path, dies: bool) -> None:
    """Full steps of decided groups, one step ahead; a kill in between changes nothing that was finished."""
    config = config_of(
        inputs,
        tmp_path / "run",
        server,
        rlvr__dynamic_sampling=True,
        rlvr__max_extra_rounds=50,
        rlvr__prompts_per_step=3,
        train__steps=4,
    )
    if dies:
        with pytest.raises(WorkerError, match="died without a word"):
            run_forked(1, _before_training({4: _die_when_all_is_there}), config)
    run_forked(1, rlvr.run, config)
    rows = metrics(tmp_path / "run")
    assert all(row["rollout/staleness_max"] <= 1 and row["rollout/prompts_missing"] == 0 for row in rows)
    assert any(row["rollout/extra_rounds"] for row in rows)
    places = Counter((row["step"], sample[0]) for row in trained(tmp_path / "run") for sample in row["samples"])
    assert places == {(step, number): SAMPLES for step in range(1, 5) for number in range(3)}
    other = _DYNAMIC.setdefault("rows", same_metrics(tmp_path / "run"))
    assert same_metrics(tmp_path / "run") == other


_DYNAMIC: dict[str, Any] = {}


def test_ppo(running: SmallServer, inputs: Path, tmp_path: Path) -> None:
    """With a value model, at two replicas, one of them killed in step 3 and the run started again."""
    tiny_ppo.write_inputs(tmp_path)
    config = tiny_ppo.ppo_config(
        tmp_path,
        tmp_path / "run",
        async__max_staleness=1,
        rollout__engine="vllm",
        rollout__temperature=1.0,
        rollout__mismatch_max=1e9,
        rollout__mismatch_mult_prob_error=1e9,
        rollout__vllm={"servers": [str(running.address)], "sync": "checkpoint"},
        train__async_save=False,
    )
    running.tempo()

    def die(ahead: Any) -> None:
        if ahead.learner.run.groups.rank == 1:
            _die(ahead)

    with pytest.raises(WorkerError, match="died without a word"):
        run_forked(2, _before_training({3: die}), config)
    run_forked(2, rlvr.run, config)
    assert ids(tmp_path / "run") == [(step, number, 0, 0) for step in range(1, 5) for number in range(10)]
    assert all(row["train/updates"] == 4 for row in metrics(tmp_path / "run"))


def test_other_prompts_are_refused_before_the_first_checkpoint(
    inputs: Path, server: SmallServer, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text((inputs / "prompts.jsonl").read_text())
    config = config_of(inputs, tmp_path / "run", server, data__path=str(data))
    with pytest.raises(WorkerError, match="died without a word"):
        run_forked(1, _before_training({1: _die_when_all_is_there}), config)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(WorkerError, match=r"JournalError: .*step_1\.replica_0\.journal: its samples were made with"):
        run_forked(1, rlvr.run, config)


def test_configuration(inputs: Path, tmp_path: Path) -> None:
    """The section is called `async` in files, where Python has that word for itself."""
    config = rlvr_config(inputs, tmp_path / "run", rollout__engine="vllm", async__max_staleness=2)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert "\nasync:\n" in file.read_text() and load_config(file, [], RlvrConfig) == config
    changed = load_config(file, ["async.update=in_flight"], RlvrConfig)
    assert changed.asynchrony.update == "in_flight"
    for override, words in (
        ("rollout.engine=embedded", "async.max_staleness 2 needs rollout.engine: vllm"),
        ("async.staleness=1", "unknown key; did you mean async.max_staleness"),
        ("asynchrony.max_staleness=1", "unknown key"),
        ("async={update: in_flight}", "async: update in_flight needs max_staleness"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(file, [override], RlvrConfig)
