"""Events of a save at which a process can kill itself: every moment that leaves another state on the disk."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import filesystem

from tulu_hpc.training import snapshot
from tulu_hpc.training.retention import Retention


class Events:
    """Counts what happens in this process, and ends it at the `fatal`-th event (0: never)."""

    def __init__(self, fatal: int) -> None:
        self.count, self._fatal, self._lock = 0, fatal, threading.Lock()

    def happen(self, name: str) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._fatal:
                os.write(2, f"killed at {name} in {threading.current_thread().name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.happen(function.__name__)
            result = function(*arguments, **options)
            self.happen(function.__name__)
            return result

        return call


def install(fatal: int) -> Events:
    """Wrap, in this (forked) process: each tensor that is written, the other files, syncs, renames, deletions, and the
    planning in the foreground."""
    events = Events(fatal)
    places: list[tuple[Any, str]] = [
        (filesystem, "_write_item"),
        (snapshot, "write_file"),
        (snapshot, "file_entry"),
        (snapshot.Snapshot, "take"),
        (snapshot.Snapshot, "seal"),
        (Retention, "apply"),
        (os, "fsync"),
        (os, "unlink"),  # shutil.rmtree: file by file
        (Path, "rename"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    ]
    for owner, name in places:
        setattr(owner, name, events.around(getattr(owner, name)))
    return events
