"""Runs one command as a child: output to a log file and the terminal, its end waited for, nothing outliving us.

Linux only where it matters: children get PR_SET_PDEATHSIG, so that SIGKILL of this process ends them too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_GRACE_SECONDS = 40.0  # torchrun gives its workers 30 s before it kills them
_LAST_LINES = 400


@dataclass(frozen=True)
class ChildResult:
    """`returncode` as of subprocess (negative: a signal); `stopped_by`: the signal we were asked to pass on, if any."""

    returncode: int
    seconds: float
    last_lines: list[str]
    stopped_by: int | None


def run_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    prefix: str = "",
    keep_open: Sequence[int] = (),
    echo: Callable[[str], None] | None = None,
) -> ChildResult:
    """Run `command` to its end; SIGINT and SIGTERM that reach us meanwhile become SIGTERM for its process group.

    Call from the main thread: signal handlers live there, and PR_SET_PDEATHSIG follows the thread that forks. A second
    signal, or `_GRACE_SECONDS` after the first, kills the child and its descendants.

    Args:
        log: gets every line (appended, after a header with the command).
        prefix: put before each line on the terminal.
        keep_open: file descriptors the child inherits (a lock that must last as long as the child).
        echo: receives each line; default: print with the prefix.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    stopped: list[int] = []
    show = _quiet_after_stop(echo if echo is not None else _printer(prefix), stopped)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("a", encoding="utf-8", buffering=1) as log_file:
        log_file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            # A group of its own: Ctrl-C in the terminal reaches us alone and we pass it on once.
            start_new_session=True,
            preexec_fn=_die_with_parent(os.getpid()),
            pass_fds=tuple(keep_open),
            text=True,
            encoding="utf-8",
            errors="replace",
            bufsize=1,
        )

        reaper = threading.Timer(_GRACE_SECONDS, _kill_tree, [child.pid])
        reaper.daemon = True

        def forward(number: int, frame: FrameType | None) -> None:
            if stopped:
                _kill_tree(child.pid)
            else:
                # SIGTERM for Ctrl-C too: training then saves its state before it stops.
                _signal_group(child.pid, signal.SIGTERM)
                reaper.start()
            stopped.append(number)

        assert child.stdout is not None
        reader = threading.Thread(target=_pump, args=(child.stdout, log_file, show, last), daemon=True)
        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            reader.start()
            # Blocks in waitpid; a signal runs `forward` and the wait goes on.
            returncode = child.wait()
        finally:
            reaper.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)
            if child.poll() is None:
                _kill_tree(child.pid)
                child.wait()
        # A stray descendant may hold the pipe open; its output is not worth waiting for.
        reader.join(timeout=5.0)
    return ChildResult(returncode, time.monotonic() - start, list(last), stopped[0] if stopped else None)


def _printer(prefix: str) -> Callable[[str], None]:
    def show(line: str) -> None:
        sys.stdout.write(f"{prefix}{line}\n")
        sys.stdout.flush()

    return show


def _quiet_after_stop(show: Callable[[str], None], stopped: Sequence[int]) -> Callable[[str], None]:
    """Once we have asked the child to stop, torchrun's account of that is for the log only."""
    muted = False

    def filtered(line: str) -> None:
        nonlocal muted
        muted = muted or (bool(stopped) and line.startswith("Traceback (most recent call last)"))
        if not muted and not (stopped and "torch/distributed/elastic" in line):
            show(line)

    return filtered


def _pump(stream: IO[str], log_file: IO[str], show: Callable[[str], None], last: deque[str]) -> None:
    for raw in stream:
        line = raw.rstrip("\n")
        last.append(line)
        log_file.write(line + "\n")
        show(line)


def _die_with_parent(parent: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:  # it died between fork and prctl
                os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(group, number)


def _kill_tree(pid: int) -> None:
    """SIGKILL to a process and its descendants: torchrun's workers are in sessions, and so groups, of their own."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
