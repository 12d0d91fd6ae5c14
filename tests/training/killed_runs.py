"""Stages run on forked processes that are killed on the way; a run so treated must end as if nothing had happened."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.rlvr import tiny_ppo, tiny_rlvr
from tests.training import kill_points, tiny_run
from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import DpoConfig, RewardModelConfig, RlvrConfig, SftConfig
from tulu_hpc.stages import dpo, reward_model, rlvr, sft

STAGES: dict[str, tuple[Any, Callable[[Any], Path]]] = {
    "sft": (SftConfig, sft.run),
    "dpo": (DpoConfig, dpo.run),
    "rm": (RewardModelConfig, reward_model.run),
    "rlvr": (RlvrConfig, rlvr.run),
    "ppo": (RlvrConfig, rlvr.run),
}
RANKS = 2


def start_forked(verb: str, config_path: Path, log: Path, *, fault: tuple[int, int] | None = None) -> list[int]:
    """The stage on RANKS forked processes, each with its own interpreter state from here on; their process ids.

    Args:
        fault: (rank, n): this rank kills itself at its n-th event of `kill_points`; n = 0 only counts (`log`.events).
    """
    store = log.with_name(f"store-{time.monotonic_ns()}")
    gc.collect()  # a process group of the parent must not die in a child: its threads are not there
    sys.stdout.flush()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            _work(rank, verb, config_path, log, store, fault)
        pids.append(pid)
    return pids


def _work(rank: int, verb: str, config_path: Path, log: Path, store: Path, fault: tuple[int, int] | None) -> None:
    code: Any = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        events = kill_points.install(fault[1]) if fault is not None and rank == fault[0] else None
        schema, run = STAGES[verb]
        run(load_config(config_path, (), schema))
        if events is not None and fault == (rank, 0):
            log.with_suffix(".events").write_text(str(events.count))
        code = 0
    except SystemExit as request:
        code = request.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_all(pids: list[int], timeout: float = 120.0, *, rest_after: float | None = None) -> list[int]:
    """Exit codes (negative: the signal); what still runs at the time limit is killed and reported so.

    Args:
        rest_after: seconds after the first death by a signal at which the other processes are killed too, as a launcher
            does.
    """
    deadline = time.monotonic() + timeout
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] < 0 and rest_after is not None:
                    deadline, rest_after = time.monotonic() + rest_after, None
        if time.monotonic() > deadline:
            kill_all([pid for pid in pids if pid not in codes])
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
    if verb in ("rlvr", "ppo"):
        make = tiny_ppo.ppo_config if verb == "ppo" else tiny_rlvr.rlvr_config
        values = make(inputs, run, train__export_hf=True, **changes).model_dump(mode="json")
        return tiny_run.write_config(values, run.with_suffix(".yaml"))
    return tiny_run.write_config(tiny_run.config(inputs, run, verb, **changes), run.with_suffix(".yaml"))


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    files = sorted((run / "hf").glob("*.safetensors"))
    assert files
    metrics = tiny_rlvr.same_metrics(run)
    assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1)), "each step once, in order"
    return {"metrics": metrics, "weights": [file.read_bytes() for file in files]}


def uninterrupted(
    inputs: Path, folder: Path, verb: str, *, fault: tuple[int, int] | None = None, **changes: Any
) -> tuple[dict[str, Any], float]:
    """Its outcome, and the seconds that it took."""
    config_path = prepare(inputs, folder / "whole", verb, **changes)
    started = time.monotonic()
    codes = wait_all(start_forked(verb, config_path, folder / "whole.log", fault=fault))
    assert codes == [0] * RANKS, f"exit codes {codes}\n{(folder / 'whole.log').read_text()}"
    return outcome(folder / "whole"), time.monotonic() - started


def kill_at_random(inputs: Path, folder: Path, verb: str, kills_wanted: int, **changes: Any) -> dict[str, int]:
    """Kill one rank, soon after it the others, until so many kills have hit; every run ends like the whole one.

    The moments are in turn a random time (start, export and end included) and a random event of `kill_points` of a
    random rank: inside the write of a file, around its sync, the renames and deletions.

    Returns:
        kills, those of them at events and in the thread that writes while training goes on, and runs.
    """
    seed = int(os.environ.get("TULU_HPC_KILL_SEED", time.time_ns() % 10**6))
    print(f"TULU_HPC_KILL_SEED={seed}")
    generator = random.Random(seed)
    wanted, duration = uninterrupted(inputs, folder, verb, fault=(0, 0), **changes)
    events = int((folder / "whole.events").read_text())
    kills, at_events, runs, log = 0, 0, 0, folder / "killed.log"
    while kills < kills_wanted:
        run = folder / f"killed{runs}"
        config_path = prepare(inputs, run, verb, **changes)
        finished = False
        while not finished:
            due, timed = kills < kills_wanted, generator.random() < 0.4
            victim, event = generator.randrange(RANKS), generator.randint(1, events // 3)
            pids = start_forked(verb, config_path, log, fault=(victim, event) if due and not timed else None)
            if due and timed:
                time.sleep(generator.uniform(0.02, 1.05) * duration)
                kill_all(pids[victim : victim + 1])
            codes = wait_all(pids, rest_after=generator.uniform(0, 0.2))
            finished = codes == [0] * RANKS
            hit = -signal.SIGKILL in codes
            kills, at_events = kills + hit, at_events + (hit and not timed)
            assert finished or hit, log.read_text()
        runs += 1
        assert outcome(run) == wanted, f"run {runs} after {kills} kills (TULU_HPC_KILL_SEED={seed})\n{log.read_text()}"
    in_background = len(re.findall(r"killed at \w+ in checkpoint", log.read_text()))
    print(
        f"{kills} kills, {at_events} of them at events of a save, {in_background} in the background, over {runs} runs"
    )
    return {"kills": kills, "at_events": at_events, "in_background": in_background, "runs": runs}
