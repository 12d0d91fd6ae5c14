"""A run that is killed, or asked to stop, at any moment ends as if nothing had happened: bit for bit.

Not proven here: a machine that loses power (the data are synced, but a kill does not test that), network file systems.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.rlvr import tiny_rlvr
from tests.training import tiny_run
from tests.training.killed_runs import (
    RANKS,
    kill_all,
    kill_at_random,
    outcome,
    prepare,
    start_forked,
    uninterrupted,
    wait_all,
)
from tests.training.small_disk import MountRefused, on_small_disk, resize
from tulu_hpc.data.chat_template import TULU
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.training.preemption import EXIT_REQUEUE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tied_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_inputs(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.mark.parametrize(
    ("verb", "kills_wanted", "changes"),
    [("sft", 6, {}), ("sft", 3, {"parallel__tensor": 2}), ("dpo", 4, {}), ("rm", 3, {}), ("rlvr", 4, {})],
)
def test_sigkill_at_random_moments(
    inputs: Path, tmp_path: Path, verb: str, kills_wanted: int, changes: dict[str, Any]
) -> None:
    kill_at_random(inputs, tmp_path, verb, kills_wanted, **changes)


def test_sigkill_with_tied_embeddings_over_two_stages(tied_inputs: Path, tmp_path: Path) -> None:
    kill_at_random(tied_inputs, tmp_path, "sft", 4, parallel__pipeline=2)


@pytest.mark.soak
@pytest.mark.parametrize("verb", ["sft", "dpo", "rm", "rlvr"])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}], ids=["dp2", "tp2", "pp2"])
def test_sigkill_soak(
    inputs: Path, tmp_path: Path, verb: str, layout: dict[str, int], soak_figures: Callable[..., None]
) -> None:
    changes = {f"parallel__{name}": degree for name, degree in layout.items()}
    soak_figures(**kill_at_random(inputs, tmp_path, verb, 5, **changes))


@pytest.mark.parametrize("verb", ["sft", "dpo"])
@pytest.mark.parametrize("way", ["signal", "stop file"])
def test_stop_on_request(inputs: Path, tmp_path: Path, verb: str, way: str) -> None:
    long = {"train__steps": 60, "train__save_every": 1000}
    run, log = tmp_path / "run", tmp_path / "run.log"
    config_path = prepare(inputs, run, verb, **long)
    pids = start_forked(verb, config_path, log)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    if way == "signal":
        os.kill(pids[1], signal.SIGUSR1)  # any one rank
    else:
        (run / "stop_requested").touch()
    assert wait_all(pids) == [EXIT_REQUEUE] * RANKS, log.read_text()
    step = int((run / "preempted").read_text())
    assert (run / "checkpoints" / f"step_{step}").is_dir()
    assert 3 <= step < 60 and len(tiny_run.losses(run)) == step
    assert wait_all(start_forked(verb, config_path, log)) == [0] * RANKS, log.read_text()
    assert not (run / "preempted").exists() and not (run / "stop_requested").exists()
    assert f"resumed at step {step} of 60" in log.read_text()
    assert outcome(run) == uninterrupted(inputs, tmp_path, verb, **long)[0]


def test_finished_run_says_so(inputs: Path, tmp_path: Path) -> None:
    wanted, _ = uninterrupted(inputs, tmp_path, "sft")
    log = tmp_path / "again.log"
    assert wait_all(start_forked("sft", tmp_path / "whole.yaml", log)) == [0] * RANKS
    assert log.read_text().count("nothing to do") == 1
    assert outcome(tmp_path / "whole") == wanted
    # An export that is gone, or a part of it, is made again from the last checkpoint.
    for spoil in (
        shutil.rmtree,
        lambda hf: (hf / "model.safetensors").unlink(),
        lambda hf: (hf / "tokenizer.json").unlink(),
    ):
        spoil(tmp_path / "whole" / "hf")
        assert wait_all(start_forked("sft", tmp_path / "whole.yaml", log)) == [0] * RANKS
        assert outcome(tmp_path / "whole") == wanted
        assert (tmp_path / "whole" / "hf" / "tokenizer.json").is_file()


def test_export_carries_the_template_it_was_trained_with(inputs: Path, tmp_path: Path) -> None:
    """As with Llama's base tokenizer, which has none."""
    shutil.copytree(inputs, tmp_path / "inputs")
    model = tmp_path / "inputs" / "model"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    assert load_tokenizer(model).chat_template is None
    uninterrupted(tmp_path / "inputs", tmp_path, "sft", train__steps=1)
    assert load_tokenizer(tmp_path / "whole" / "hf").chat_template == TULU


def test_command_under_torchrun_is_killed_and_continues(inputs: Path, tmp_path: Path) -> None:
    """The same through the command line and torchrun, the whole session killed once; the forked runs are its equal."""
    wanted, _ = uninterrupted(inputs, tmp_path, "sft", train__steps=30)
    config_path = prepare(inputs, tmp_path / "run", "sft", train__steps=30)
    process = tiny_run.start("sft", config_path, processes=RANKS)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step_[4-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    # Workers are sessions of their own: killing torchrun alone would leave them running to the end.
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    kill_all(family)
    process.communicate()
    assert not (tmp_path / "run" / "finished.json").exists()
    code, output = tiny_run.run_to_end("sft", config_path, processes=RANKS)
    assert code == 0, output
    assert "resumed at step" in output
    assert outcome(tmp_path / "run") == wanted


@pytest.mark.parametrize("on_error", ["raise", "continue"])
def test_full_disk_stops_a_run_and_loses_nothing(inputs: Path, tmp_path: Path, on_error: str) -> None:
    """Checkpoints on a disk that holds one of them and a part of the next, until it is enlarged."""
    wanted, _ = uninterrupted(inputs, tmp_path, "sft", train__keep_last=1)
    checkpoint_bytes = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints" / "step_12").iterdir())
    config_path = prepare(inputs, tmp_path / "run", "sft", train__keep_last=1, train__on_save_error=on_error)
    disk, log, checkpoints = tmp_path / "disk", tmp_path / "run.log", tmp_path / "run" / "checkpoints"
    disk.mkdir()
    checkpoints.parent.mkdir()
    checkpoints.symlink_to(disk)

    def run_twice() -> dict[str, Any]:
        codes = wait_all(start_forked("sft", config_path, log))
        left = sorted(path.name for path in disk.iterdir())
        first_log = log.read_text()
        resize(disk, 8 * checkpoint_bytes)
        again = wait_all(start_forked("sft", config_path, log))
        return {"codes": codes, "left": left, "log": first_log, "again": again}

    try:
        found = on_small_disk(disk, int(1.6 * checkpoint_bytes), run_twice)
    except MountRefused as refused:
        pytest.skip(f"no file system of our own: {refused}")
    assert found["codes"] == [1, 1] and found["again"] == [0, 0], log.read_text()
    assert found["left"] == ["step_2"]
    message = f"checkpoint step_4 could not be written: {checkpoints / 'step_4.tmp'}/"
    assert message in found["log"] and "No space left on device (rank " in found["log"]
    assert "bytes more are needed" in found["log"]
    assert found["log"].count("training goes on") == (4 if on_error == "continue" else 0)  # steps 4 to 10
    assert "resumed at step 2 of 12" in log.read_text()
    assert outcome(tmp_path / "run") == wanted


def test_full_disk_under_the_whole_run_directory(inputs: Path, tmp_path: Path) -> None:
    """Whatever meets the full disk first, a checkpoint or a line of metrics."""
    wanted, _ = uninterrupted(inputs, tmp_path, "sft", train__keep_last=1)
    checkpoint_bytes = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints" / "step_12").iterdir())
    disk, log = tmp_path / "disk", tmp_path / "run.log"
    disk.mkdir()

    def run_twice() -> dict[str, Any]:
        config_path = prepare(inputs, disk / "run", "sft", train__keep_last=1)
        codes = wait_all(start_forked("sft", config_path, log))
        first_log = log.read_text()
        resize(disk, 20 * checkpoint_bytes)
        again = wait_all(start_forked("sft", config_path, log))
        end = outcome(disk / "run") if again == [0, 0] else None
        return {"codes": codes, "log": first_log, "again": again, "outcome": end}

    try:
        found = on_small_disk(disk, int(1.6 * checkpoint_bytes), run_twice)
    except MountRefused as refused:
        pytest.skip(f"no file system of our own: {refused}")
    assert 0 not in found["codes"] and "No space left on device" in found["log"]
    assert found["again"] == [0, 0] and found["outcome"] == wanted, log.read_text()


@pytest.mark.parametrize(("verb", "metric", "mode"), [("sft", "train/loss", "min"), ("rlvr", "rollout/reward", "max")])
def test_best_checkpoint_of_a_run(inputs: Path, tmp_path: Path, verb: str, metric: str, mode: str) -> None:
    best = {"train__keep_best": 1, "train__best_metric": metric, "train__best_mode": mode, "train__keep_last": 1}
    found, _ = uninterrupted(inputs, tmp_path, verb, **best)
    values = [row[metric] for row in found["metrics"]]
    means = {step: sum(values[step - 2 : step]) / 2 for step in range(2, len(values) + 1, 2)}
    wanted = (min if mode == "min" else max)(means, key=lambda step: means[step])
    checkpoints = tmp_path / "whole" / "checkpoints"
    state = json.loads((checkpoints / "best" / "trainer_state.json").read_text())
    assert state["score"] == {"metric": metric, "value": pytest.approx(means[wanted])}
    assert state["extra"].get("rollout_step", state["step"]) == wanted
    assert len([path for path in checkpoints.iterdir() if path.name.startswith("step_")]) <= 2


def test_unknown_best_metric_is_named_at_the_first_step(inputs: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    config_path = prepare(inputs, tmp_path / "run", "sft", train__keep_best=1, train__best_metric="train/los")
    assert wait_all(start_forked("sft", config_path, log)) == [1] * RANKS
    assert "train.best_metric = train/los: there is no such metric; there are train/loss" in log.read_text()
