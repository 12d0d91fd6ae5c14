"""Processes that take turns, so that contestants can be compared on a machine that is not quiet.

Every contestant is one process with its own resident model. The driver gives each of them one optimizer step in turn
(A B A B ...): a slow moment of the machine hits all, and step `i` of every worker is the same global batch. A worker
that is not on turn blocks on its standard input and uses no processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from common import Spec


class Turn:
    """A worker's side of the pipe: `wait()` blocks until the driver gives the turn, `report()` hands it back."""

    def __init__(self) -> None:
        # Libraries print to stdout; the protocol keeps the real one for itself and sends theirs to stderr.
        self._replies: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._started = time.perf_counter(), time.process_time()

    def wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit("the driver has gone")
        self._started = time.perf_counter(), time.process_time()

    def report(self, **values: Any) -> None:
        wall, cpu = self._started
        values |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        self._replies.write(json.dumps(values) + "\n")


def current_rss() -> int:
    """Resident bytes of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def run_worker(workers: dict[str, Callable[[Spec, Turn], None]], name: str, spec_file: str) -> None:
    """Entry of a worker process: `workers[name](spec, turn)`; it must report once when ready and once per step.

    Its first turn is for setting up, so that no contestant is set up while another one works.
    """
    spec = Spec(**json.loads(Path(spec_file).read_text()))
    import torch

    torch.set_num_threads(spec.threads)
    turn = Turn()
    turn.wait()
    workers[name](spec, turn)
    turn.wait()
    turn.report(peak_rss=peak_rss())


class Worker:
    """A contestant's process as the driver sees it."""

    def __init__(self, label: str, script: Path, worker: str, spec: Spec, directory: Path) -> None:
        self.label = label
        spec_file = directory / f"{label}.json"
        spec_file.write_text(json.dumps(dataclasses.asdict(spec)))
        self._log = directory / f"{label}.log"
        threads = str(spec.threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(directory / f"{label}.hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(script), "--worker", worker, "--spec", str(spec_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def turn(self) -> dict[str, Any]:
        """Let the worker run until its next report and return that."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.report()

    def report(self) -> dict[str, Any]:
        """Wait for a report.

        Raises:
            RuntimeError: the worker ended; with the end of its log.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            tail = "\n".join(self._log.read_text().splitlines()[-25:])
            raise RuntimeError(f"worker {self.label} ended with code {self.process.returncode}:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Outcome:
    """What one contestant did: one entry per step, warm-up included."""

    label: str
    setup: dict[str, Any]
    steps: list[dict[str, Any]]
    peak_rss: int

    def series(self, key: str) -> list[float]:
        return [float(step[key]) for step in self.steps]


def take_turns(contestants: Sequence[Worker], steps: int) -> list[Outcome]:
    """Set the contestants up one after the other, then give each one step in turn, `steps` times."""
    try:
        setups = [worker.turn() for worker in contestants]
        reports: list[list[dict[str, Any]]] = [[] for _ in contestants]
        for _ in range(steps):
            for worker, seen in zip(contestants, reports, strict=True):
                seen.append(worker.turn())
        return [
            Outcome(worker.label, setup, seen, worker.turn()["peak_rss"])
            for worker, setup, seen in zip(contestants, setups, reports, strict=True)
        ]
    finally:
        for worker in contestants:
            worker.close()
