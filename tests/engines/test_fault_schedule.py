"""An rlvr run on two real vLLM servers under a random schedule of faults ends with the samples of a run without any."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines import faults
from tests.engines import vllm_server as real
from tests.engines.faults import Host, Proxies, Schedule
from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import metrics, rlvr_config
from tulu_hpc.config.loader import dump_yaml
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.server import Server
from tulu_hpc.stages.rlvr_buffer import TRAINED

pytestmark = [real.needs_vllm, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
PROMPTS, SAMPLES = 6, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_rlvr.write_inputs(tmp_path_factory.mktemp("inputs"))
    real.write_model(folder, tied=False, hidden_size=128, intermediate_size=384)  # an update of several buckets
    return folder


@pytest.fixture(scope="module")
def hosts(inputs: Path) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        servers = []
        for number in range(2):
            servers.append(Server(real.options(inputs), inputs / f"server-{number}.log"))
            stack.callback(servers[-1].stop)
        for server in servers:
            real.wait(server)
        yield [Host(server) for server in servers]


@dataclass
class Outcome:
    """How a run ended: samples of each step, and what it printed."""

    samples: list[str]
    output: str
    trainers: int


def train(inputs: Path, folder: Path, addresses: Sequence[Address], steps: int, staleness: int, watch: Any) -> Outcome:
    """Run rlvr until it ends by itself; started again when it was killed.

    Args:
        watch: told of the process's pid; None when it has ended.
    """
    config = rlvr_config(
        inputs,
        folder / "run",
        train__steps=steps,
        train__save_every=1,
        rlvr__prompts_per_step=PROMPTS,
        rlvr__samples_per_prompt=SAMPLES,
        rollout__engine="vllm",
        rollout__temperature=1.0,
        rollout__vllm={
            "servers": [str(address) for address in addresses],
            "bucket_mib": 1,
            "deadline_seconds": 8.0,
            "probe_seconds": 1.0,
            "sync_timeout_seconds": 20.0,
            "attempts": 8,
        },
        async__max_staleness=staleness,
    )
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-m", "tests.engines.faulty_rlvr", str(folder / "config.yaml"), str(folder / "samples")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    log, trainers, code = folder / "log", 0, -9
    while code == -9:
        trainers += 1
        with log.open("ab") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            watch(process.pid)
            code = process.wait(5400)
        finally:
            watch(None)
            process.kill()
    assert code == 0, log.read_text()[-6000:]
    samples = [each for file in sorted((folder / "samples").iterdir()) for each in json.loads(file.read_text())]
    return Outcome(samples, log.read_text(), trainers)


def without_faults(inputs: Path, folder: Path, hosts: Sequence[Host], steps: int, staleness: int) -> Outcome:
    addresses = [host.server.address for host in hosts]
    found = train(inputs, folder, addresses, steps, staleness, lambda pid: None)
    assert found.trainers == 1 and len(set(found.samples)) == len(found.samples) == steps * PROMPTS * SAMPLES
    return found


def run_schedule(
    inputs: Path, folder: Path, hosts: Sequence[Host], chosen: Sequence[str], steps: int, staleness: int
) -> tuple[Outcome, Schedule]:
    seed = secrets.randbits(32)
    control = steps * len(hosts) * 7  # pause, is_paused, ..., resume
    schedule = Schedule(chosen, seed, samples=steps * PROMPTS * SAMPLES, control=control)
    print(f"seed of the schedule: {seed}")
    running: list[int | None] = [None]
    schedule.trainer = lambda: running[0]
    expected = without_faults(inputs, folder / "calm", hosts, steps, staleness)
    with Proxies(hosts, schedule) as proxies:
        found = train(
            inputs, folder / "stormy", proxies.addresses, steps, staleness, lambda pid: running.__setitem__(0, pid)
        )
    print("\n".join(schedule.fired))
    print(found.output[-20000:])
    assert schedule.left == 0 and len(schedule.fired) == len(chosen), f"{schedule.left} faults did not happen"
    assert Counter(found.samples) == Counter(expected.samples)
    kills = sum(fault == faults.KILL_TRAINER for fault in chosen)
    assert found.trainers == 1 + kills
    run = folder / "stormy" / "run"
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["rollout/logprob_error_max"] < 1e-4 and row["train/updates"] == 1 for row in rows)
    if staleness:
        check_trained(run, steps)
    return found, schedule


def check_trained(run: Path, steps: int) -> None:
    """The buffer's own list: every place of every step once, and no sample in two places."""
    lines = [json.loads(line) for line in (run / "buffer" / TRAINED).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    places = [[prompt, 0, sample] for prompt in range(PROMPTS) for sample in range(SAMPLES)]
    assert all([row[:3] for row in line["samples"]] == places for line in lines)
    digests = [row[-1] for line in lines for row in line["samples"]]
    assert len(set(digests)) == len(digests)


def test_some_faults(inputs: Path, tmp_path: Path, hosts: list[Host]) -> None:
    chosen = [faults.KILL, faults.STOP, faults.KILL_TRAINER, faults.KILL_IN_UPDATE, faults.LOSE, faults.OLD]
    run_schedule(inputs, tmp_path, hosts, chosen, steps=5, staleness=0)


@pytest.mark.soak
@pytest.mark.timeout(10_800)
def test_many_faults(inputs: Path, tmp_path: Path, hosts: list[Host], soak_figures: Callable[..., None]) -> None:
    chosen = [*faults.NETWORK * 3, *[faults.KILL, faults.STOP] * 6, *faults.IN_UPDATE * 4]
    started = time.perf_counter()
    found, schedule = run_schedule(inputs, tmp_path, hosts, chosen, steps=40, staleness=1)
    soak_figures(
        cases=len(schedule.fired),
        samples=len(found.samples),
        trainers=found.trainers,
        minutes=round((time.perf_counter() - started) / 60, 1),
    )
