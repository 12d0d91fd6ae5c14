"""A run that is killed, or asked to stop, at any moment ends as if nothing had happened: bit for bit.

Not proven here: a machine that loses power (the data are synced, but a kill does not test that), network file systems.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.rlvr import tiny_rlvr
from tests.training import tiny_run
from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import DpoConfig, RlvrConfig, SftConfig
from tulu_hpc.data.chat_template import TULU
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.stages import dpo, rlvr, sft
from tulu_hpc.training.preemption import EXIT_REQUEUE

STAGES: dict[str, tuple[Any, Callable[[Any], Path]]] = {
    "sft": (SftConfig, sft.run),
    "dpo": (DpoConfig, dpo.run),
    "rlvr": (RlvrConfig, rlvr.run),
}
RANKS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tied_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_inputs(tmp_path_factory.mktemp("tied"), tied=True)


def start_forked(verb: str, config_path: Path, log: Path) -> list[int]:
    """The stage on RANKS forked processes, each with its own interpreter state from here on; their process ids."""
    store = log.with_name(f"store-{time.monotonic_ns()}")
    sys.stdout.flush()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            _work(rank, verb, config_path, log, store)
        pids.append(pid)
    return pids


def _work(rank: int, verb: str, config_path: Path, log: Path, store: Path) -> None:
    code: Any = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        schema, run = STAGES[verb]
        run(load_config(config_path, (), schema))
        code = 0
    except SystemExit as request:
        code = request.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_all(pids: list[int], timeout: float = 120.0) -> list[int]:
    """Exit codes (negative: the signal); what still runs at the time limit is killed and reported so."""
    deadline, codes = time.monotonic() + timeout, {}
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            kill_all(pids)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def prepare(inputs: Path, run: Path, verb: str, **changes: Any) -> Path:
    run.parent.mkdir(parents=True, exist_ok=True)
    if verb == "rlvr":
        values = tiny_rlvr.rlvr_config(inputs, run, train__export_hf=True, **changes).model_dump(mode="json")
        return tiny_run.write_config(values, run.with_suffix(".yaml"))
    return tiny_run.write_config(tiny_run.config(inputs, run, verb, **changes), run.with_suffix(".yaml"))


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    files = sorted((run / "hf").glob("*.safetensors"))
    assert files
    metrics = tiny_rlvr.same_metrics(run)
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1)), "each step once, in order"
    return {"metrics": metrics, "weights": [file.read_bytes() for file in files]}


def uninterrupted(inputs: Path, folder: Path, verb: str, **changes: Any) -> tuple[dict[str, Any], float]:
    config_path = prepare(inputs, folder / "whole", verb, **changes)
    started = time.monotonic()
    codes = wait_all(start_forked(verb, config_path, folder / "whole.log"))
    assert codes == [0] * RANKS, (folder / "whole.log").read_text()
    return outcome(folder / "whole"), time.monotonic() - started


def kill_at_random(inputs: Path, folder: Path, verb: str, kills_wanted: int, **changes: Any) -> None:
    """Kill all ranks of runs at random moments (start, export and end included) until so many have been hit."""
    seed = int(os.environ.get("TULU_HPC_KILL_SEED", time.time_ns() % 10**6))
    print(f"TULU_HPC_KILL_SEED={seed}")
    generator = random.Random(seed)
    wanted, duration = uninterrupted(inputs, folder, verb, **changes)
    kills, runs, log = 0, 0, folder / "killed.log"
    while kills < kills_wanted:
        run = folder / f"killed{runs}"
        config_path = prepare(inputs, run, verb, **changes)
        finished = False
        while not finished:
            pids = start_forked(verb, config_path, log)
            if kills < kills_wanted:
                time.sleep(generator.uniform(0.02, 1.05) * duration)
                generator.shuffle(pids)
                kill_all(pids)
            codes = wait_all(pids)
            finished = codes == [0] * RANKS
            kills += -signal.SIGKILL in codes
            assert finished or -signal.SIGKILL in codes, log.read_text()
        runs += 1
        assert outcome(run) == wanted, f"run {runs} after {kills} kills (TULU_HPC_KILL_SEED={seed})\n{log.read_text()}"
    print(f"{kills} kills over {runs} runs")


@pytest.mark.parametrize(
    ("verb", "kills_wanted", "changes"),
    [("sft", 10, {}), ("sft", 3, {"parallel__tensor": 2}), ("dpo", 4, {}), ("rlvr", 4, {})],
)
def test_sigkill_at_random_moments(
    inputs: Path, tmp_path: Path, verb: str, kills_wanted: int, changes: dict[str, Any]
) -> None:
    kill_at_random(inputs, tmp_path, verb, kills_wanted, **changes)


def test_sigkill_with_tied_embeddings_over_two_stages(tied_inputs: Path, tmp_path: Path) -> None:
    kill_at_random(tied_inputs, tmp_path, "sft", 4, parallel__pipeline=2)


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
