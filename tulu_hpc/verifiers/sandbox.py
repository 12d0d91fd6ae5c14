"""Verdicts from worker processes that can be killed: model output never runs or hangs in the trainer.

The clock is the parent's: a verdict that takes longer than its time costs its worker's life and scores 0. So do a
worker's exit, an answer that is no frame, and one that is too long; an exception scores 0 and leaves the worker alive.
Everything is counted. A worker is its own session, and with it go the children it left in its process group. On Linux
it has neither root's powers nor system calls to write files, use the network or start processes, unless granted.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tulu_hpc.verifiers.cache import VerdictCache, source_hash
from tulu_hpc.verifiers.judge import JudgeSettings
from tulu_hpc.verifiers.registry import RULE_SETS, Verdict, require_grants
from tulu_hpc.verifiers.worker import HEADER, encode_frame

_TASKS_PER_FRAME = 32
_MAX_REPLY_BYTES = 1 << 20
_READ_BYTES = 1 << 16
LOST = ("lost: ", "error: ")  # how the reason of a verdict begins that scored 0 for want of one
_REASONS = {  # the same by the count in `PoolStats` that it is in
    "timeouts": "lost: no verdict within",
    "crashes": "lost: the worker ended",
    "garbage": "lost: the worker's answer is not a verdict",
    "errors": "error: ",
}
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")

Task = tuple[Mapping[str, Any], str]  # (record, completion)


def loss_of(reason: str) -> str | None:
    """The count in `PoolStats` that a verdict of this reason is in; None when it was not lost."""
    return next((name for name, beginning in _REASONS.items() if reason.startswith(beginning)), None)


class SandboxError(RuntimeError):
    """The workers cannot be started: not a matter of one verdict."""


@dataclass
class PoolStats:
    """Counts since the pool was opened or they were taken.

    Each of timeouts, crashes, garbage and errors is one verdict lost (score 0). `cached`: those that took no worker.
    """

    verdicts: int = 0
    timeouts: int = 0
    crashes: int = 0
    garbage: int = 0
    errors: int = 0
    restarts: int = 0
    cached: int = 0

    @property
    def lost(self) -> int:
        return self.timeouts + self.crashes + self.garbage + self.errors

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class _Worker:
    """One process with its pipes and the tasks that it owes."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, bufsize=0
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)
        self.ready = False
        self.owed: deque[int] = deque()  # positions in the batch, in the order of the request
        self.answered = 0  # of the current request
        self.outgoing = memoryview(b"")
        self.incoming = bytearray()
        self.deadline = 0.0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole session: forked children too
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


class VerifierPool:
    """Workers that verify completions under a wall clock.

    On Linux a worker also dies with the thread that started it, so open the pool in a thread that outlives it.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout_seconds: float = 5.0,
        *,
        rules: str = "fixed",
        modules: Sequence[str] = (),
        grants: Sequence[str] = (),
        judge: JudgeSettings | None = None,
        cache: bool = False,
        cache_folder: str | Path | None = None,
        memory_mib: int = 2048,
        start_seconds: float = 120.0,
    ) -> None:
        """Start nothing yet: `open` (or `with`, or the first batch) does.

        Args:
            workers: processes.
            timeout_seconds: wall clock of one verdict.
            rules: rule set of the verifiers, see `registry.RULE_SETS`.
            modules: further modules that a worker imports, e.g. with verifiers of one's own.
            grants: what workers may do beyond reading files and computing, see `registry.GRANTS`.
            judge: endpoint of the `judge` verifier.
            cache: keep verdicts by content, see `cache.VerdictCache`.
            cache_folder: keep them there for later runs too; switches the cache on.
            memory_mib: address space of a worker; 0 for no limit.
            start_seconds: how long a worker may take to be ready.
        """
        if workers < 1 or timeout_seconds <= 0:
            raise ValueError(f"a pool needs workers >= 1 and timeout_seconds > 0, got {workers} and {timeout_seconds}")
        if rules not in RULE_SETS:
            raise ValueError(f"unknown rule set {rules!r}; known: {', '.join(RULE_SETS)}")
        require_grants(grants)
        self.size, self.timeout, self.rules, self.start_seconds = workers, timeout_seconds, rules, start_seconds
        self.stats = PoolStats()
        self._command = [sys.executable, "-m", "tulu_hpc.verifiers.worker", "--parent", str(os.getpid())]
        self._command += ["--memory-mib", str(memory_mib)]
        self._command += [argument for module in modules for argument in ("--module", module)]
        self._command += [argument for grant in grants for argument in ("--grant", grant)]
        self._environment = {key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ}
        if judge is not None:
            self._command += ["--judge", json.dumps(asdict(judge))]
            if judge.key_variable in os.environ:
                self._environment[judge.key_variable] = os.environ[judge.key_variable]
        self.cache: VerdictCache | None = None
        if cache or cache_folder is not None:
            identity = [rules, source_hash(modules), asdict(judge) if judge is not None else None]
            self.cache = VerdictCache(identity, cache_folder)
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *(path for path in sys.path if path)]
        self._environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def take_stats(self) -> PoolStats:
        """The counts since the pool was opened or since this was last called."""
        taken, self.stats = self.stats, PoolStats()
        return taken

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Start the workers without waiting for them, so that they are ready when the first batch comes."""
        while len(self._workers) < self.size:
            self._workers.append(self._start())

    def close(self) -> None:
        """Kill the workers. The pool may be used again: a new batch starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        if self.cache is not None:
            self.cache.close()

    def verify(self, record: Mapping[str, Any], completion: str) -> Verdict:
        """One verdict; see `verify_batch`."""
        return self.verify_batch([(record, completion)])[0]

    def verify_batch(self, tasks: Sequence[Task]) -> list[Verdict]:
        """Verdicts in the order of the tasks.

        Raises:
            SandboxError: workers do not start.
        """
        if self.cache is None:
            return self._verify(tasks)
        keys = [self.cache.key(*task) for task in tasks]
        found = [self.cache.get(key) if key is not None else None for key in keys]
        missing = [i for i, verdict in enumerate(found) if verdict is None]
        first = {keys[i] or str(i): i for i in reversed(missing)}  # of equal tasks one is enough
        asked = sorted(first.values())
        fresh = dict(zip(asked, self._verify([tasks[i] for i in asked]), strict=True)) if asked else {}
        for i, verdict in fresh.items():
            key = keys[i]
            if key is not None and not verdict.reason.startswith(LOST):
                self.cache.put(key, verdict)
        self.cache.flush()
        self.stats.verdicts += len(tasks) - len(asked)
        self.stats.cached += len(tasks) - len(asked)
        return [verdict or fresh[first[keys[i] or str(i)]] for i, verdict in enumerate(found)]

    def _verify(self, tasks: Sequence[Task]) -> list[Verdict]:
        """The same, by the workers."""
        results: list[Verdict | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        self.open()
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            try:
                while waiting or any(worker.owed for worker in self._workers):
                    self._round(selector, tasks, waiting, results)
            except BaseException:
                self.close()  # an interrupted batch leaves answers in the pipes: those workers are of no more use
                raise
        self.stats.verdicts += len(tasks)
        return [result for result in results if result is not None]

    def _round(
        self,
        selector: selectors.BaseSelector,
        tasks: Sequence[Task],
        waiting: deque[int],
        results: list[Verdict | None],
    ) -> None:
        """Hand out work, wait for the next event or deadline, and deal with it."""
        share = max(1, min(_TASKS_PER_FRAME, -(-len(waiting) // len(self._workers))))
        for worker in self._workers:
            if worker.ready and not worker.owed and waiting:
                worker.owed.extend(waiting.popleft() for _ in range(min(share, len(waiting))))
                batch = [[dict(tasks[i][0]), tasks[i][1]] for i in worker.owed]
                worker.outgoing = memoryview(encode_frame({"rules": self.rules, "tasks": batch}))
                worker.answered = 0
                worker.deadline = time.monotonic() + self.timeout
                selector.register(worker.input, selectors.EVENT_WRITE, worker)
        busy = [worker for worker in self._workers if worker.owed or not worker.ready]
        if not busy:
            return
        pause = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        for key, events in selector.select(pause):
            worker = key.data
            if worker in self._workers:  # not replaced by an earlier event of this round
                failure = self._write(selector, worker) if events & selectors.EVENT_WRITE else None
                failure = failure or (self._read(worker, results) if events & selectors.EVENT_READ else None)
                if failure:
                    self._replace(selector, worker, failure, waiting, results)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if (worker.owed or not worker.ready)]:
            if now >= worker.deadline:
                self._replace(selector, worker, "timeouts", waiting, results)

    def _write(self, selector: selectors.BaseSelector, worker: _Worker) -> str | None:
        try:
            worker.outgoing = worker.outgoing[os.write(worker.input, worker.outgoing) :]
        except BlockingIOError:
            return None
        except BrokenPipeError:
            return "crashes"
        if not worker.outgoing:
            selector.unregister(worker.input)
        worker.deadline = time.monotonic() + self.timeout  # the clock of the first verdict starts once it can be read
        return None

    def _read(self, worker: _Worker, results: list[Verdict | None]) -> str | None:
        try:
            received = os.read(worker.output, _READ_BYTES)
        except BlockingIOError:
            return None
        if not received:
            return "crashes"
        worker.incoming += received
        while len(worker.incoming) >= HEADER.size:
            (size,) = HEADER.unpack_from(worker.incoming)
            if size > _MAX_REPLY_BYTES:
                return "garbage"
            if len(worker.incoming) < HEADER.size + size:
                return None
            body = bytes(worker.incoming[HEADER.size : HEADER.size + size])
            del worker.incoming[: HEADER.size + size]
            if not self._accept(worker, body, results):
                return "garbage"
        return None

    def _accept(self, worker: _Worker, body: bytes, results: list[Verdict | None]) -> bool:
        """Take one reply; False if it is not what the protocol asks for."""
        try:
            reply = json.loads(body)
        except ValueError:
            return False
        if not isinstance(reply, dict):
            return False
        if not worker.ready:
            worker.ready = reply == {"ready": True}
            self._failed_starts = 0
            return worker.ready
        if worker.owed and reply.keys() == {"preparing"}:
            worker.deadline = time.monotonic() + (self.start_seconds if reply["preparing"] is True else self.timeout)
            return True
        if not worker.owed or reply.get("index") != worker.answered:
            return False
        if "error" in reply:
            verdict = Verdict(0.0, f"error: {reply['error']}")
            self.stats.errors += 1
        else:
            score = reply.get("score")
            if not isinstance(score, float) or not 0.0 <= score <= 1.0:
                return False
            verdict = Verdict(score, str(reply.get("reason", "")), reply.get("metrics") or {})
        results[worker.owed.popleft()] = verdict
        worker.answered += 1
        worker.deadline = time.monotonic() + self.timeout
        return True

    def _replace(
        self,
        selector: selectors.BaseSelector,
        worker: _Worker,
        failure: str,
        waiting: deque[int],
        results: list[Verdict | None],
    ) -> None:
        """Kill a worker, charge the verdict it was at, put the rest of its share back, start another worker."""
        selector.unregister(worker.output)
        if worker.outgoing:
            selector.unregister(worker.input)
        worker.kill()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= 3:
                raise SandboxError(
                    f"a verifier worker did not start ({failure}, exit code {worker.process.returncode}): "
                    f"{' '.join(self._command)}"
                )
        if worker.owed:
            reason = {
                "timeouts": f" {self.timeout:g} s",
                "crashes": f" with code {worker.process.returncode}",
                "garbage": "",
            }[failure]
            results[worker.owed.popleft()] = Verdict(0.0, _REASONS[failure] + reason)
            setattr(self.stats, failure, getattr(self.stats, failure) + 1)
            waiting.extendleft(reversed(worker.owed))
        self.stats.restarts += 1
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        selector.register(fresh.output, selectors.EVENT_READ, fresh)

    def _start(self) -> _Worker:
        worker = _Worker(self._command, self._environment)
        worker.deadline = time.monotonic() + self.start_seconds
        return worker
