"""Run a function on N gloo ranks: import once, fork N workers, collect one result per rank.

Forking after the imports makes a parallel test cost what its collectives cost, not N times the imports.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tulu_hpc.parallel.layout import Groups, Layout, destroy, initialize

_GRACE_SECONDS = 2.0  # for the other ranks to report too, once one has failed


class WorkerError(AssertionError):
    """At least one rank raised, died or ran out of time; the message holds their tracebacks."""


def run_forked(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` on `world` forked ranks with a running gloo world; the results in rank order.

    The workers have RANK, WORLD_SIZE and LOCAL_RANK set and `torch.distributed` started; `parallel.layout.initialize`
    may be called in them as often as wanted. Nothing is pickled on the way in; results must be picklable.

    Raises:
        WorkerError: with the traceback of every rank that failed.
    """
    gc.collect()  # a process group of the parent must not die in a child: its threads are not there
    if dist.is_initialized():
        raise RuntimeError("a process group runs in the test process; end it (layout.destroy) before forking")
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA is initialised in the test process; it does not survive a fork")
    sys.stdout.flush()
    sys.stderr.flush()
    workers: dict[int, tuple[int, Connection]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                receiver, sender = Pipe(duplex=False)
                pid = os.fork()
                if pid == 0:
                    receiver.close()
                    _work(rank, world, Path(folder) / "store", sender, timeout, function, args)
                sender.close()
                workers[rank] = (pid, receiver)
            return _collect(workers, timeout)
        finally:
            for pid, receiver in workers.values():
                receiver.close()
                _end(pid)


def _work(
    rank: int,
    world: int,
    store: Path,
    sender: Connection,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        sender.send_bytes(pickle.dumps((True, function(*args))))
        code = 0
    except BaseException:  # everything is reported to the test; the worker ends in any case
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sender.close()
        os._exit(code)  # without the clean-up of the test process


def _collect(workers: dict[int, tuple[int, Connection]], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    waiting = {connection: rank for rank, (_pid, connection) in workers.items()}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(waiting), timeout=left):
            assert isinstance(ready, Connection)
            rank = waiting.pop(ready)
            try:
                fine, value = pickle.loads(ready.recv_bytes())
            except EOFError:
                fine, value = False, "died without a word (killed?)"
            if fine:
                results[rank] = value
                continue
            failures[rank] = value
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    for rank in waiting.values():
        failures.setdefault(
            rank, f"did not finish within {timeout} s" if not failures else "was waiting for the others"
        )
    if failures:
        raise WorkerError("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in sorted(results)]


def _end(pid: int) -> None:
    """Reap a worker; one that still runs (after a failure or a timeout) is killed."""
    for _ in range(200):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@contextmanager
def single_process(layout: Layout | None = None, seed: int = 1) -> Iterator[Groups]:
    """A world of one in the test process itself, ended afterwards (so that later tests can fork)."""
    try:
        yield initialize(layout or Layout(), seed=seed)
    finally:
        destroy()
