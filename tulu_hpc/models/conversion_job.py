"""A directory written file by file by several threads, that survives kill -9 and appears only when it is whole.

    .NAME.converting/          beside the target
        FILE                   a finished file
        FILE.part              one being written
        progress/plan.json     what is being made of what; another plan starts anew
        progress/FILE.json     size, checksum and contents of a finished file

A file counts as finished once it and its note are on disk; a new start compares it with its note before it is kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from tulu_hpc.models.checksums import file_entry
from tulu_hpc.models.safetensors_files import sync_to_disk

PROGRESS, PLAN = "progress", "plan.json"

Note = dict[str, Any]
Write = Callable[[Any], object]


class ConversionError(ValueError):
    """A conversion cannot be done or its result is not right; the message names file and tensor."""


def write_files(
    staging: Path,
    names: Sequence[str],
    write: Callable[[int, Write, Callable[[], None]], Note],
    *,
    workers: int,
    done: Callable[[int, bool], None] = lambda count, kept: None,
) -> list[Note]:
    """Write the files of a plan, `workers` at a time, except those that an earlier start finished.

    Args:
        staging: from `staged`.
        write: (index of the file, sink of its bytes, to be called between blocks) -> its note.
        done: told how many are finished, and whether the last one was kept from before.

    Returns:
        The notes, in the order of `names`; each with "file": size and checksum.
    """
    notes: dict[int, Note] = {}
    stop = threading.Event()
    lock = threading.Lock()

    def one(index: int) -> None:
        if stop.is_set():
            return
        note = _kept(staging, names[index])
        kept = note is not None
        if note is None:
            note = _write_one(staging, names[index], lambda sink: write(index, sink, lambda: _check(stop)))
        with lock:
            notes[index] = note
            done(len(notes), kept)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, index) for index in range(len(names))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, _Stopped):
            raise error
    return [notes[index] for index in range(len(names))]


class _Stopped(Exception):
    """Another thread failed."""


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopped


def _kept(staging: Path, name: str) -> Note | None:
    """The note of a file that is finished and undamaged."""
    try:
        note: Note = json.loads((staging / PROGRESS / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    if not (staging / name).is_file() or file_entry(staging / name) != note["file"]:
        return None
    return note


def _write_one(staging: Path, name: str, write: Callable[[Write], Note]) -> Note:
    partial = staging / f"{name}.part"
    digest = xxhash.xxh3_128()
    size = 0
    with partial.open("wb", buffering=0) as stream:

        def sink(data: Any) -> None:
            nonlocal size
            view = memoryview(data).cast("B")
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[stream.write(view) :]

        note = write(sink)
        os.fsync(stream.fileno())
    note["file"] = {"size": size, "xxh3": digest.hexdigest()}
    partial.rename(staging / name)
    _write_note(staging / PROGRESS / f"{name}.json", note)
    return note


def _write_note(file: Path, value: Any) -> None:
    """A JSON file that is whole or not there."""
    partial = file.with_name(f"{file.name}.part")
    with partial.open("w") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
    sync_to_disk(file.parent)


@contextmanager
def staged(target: Path, plan: Note) -> Iterator[Path]:
    """The directory to write into; it becomes `target` when the block ends without an error.

    After an error or a kill it stays, for the next start with the same plan to continue.

    Raises:
        ConversionError: the target exists, or another process is writing it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"{target}: another process is writing it (it holds {lock})") from None
        if target.exists():
            raise ConversionError(f"{target}: exists already; move it away or give another directory")
        staging = target.with_name(f".{target.name}.converting")
        _open_staging(staging, plan)
        yield staging
        for path in staging.iterdir():
            if path.name != PROGRESS:
                sync_to_disk(path)
        shutil.rmtree(staging / PROGRESS)
        sync_to_disk(staging)
        staging.rename(target)
        sync_to_disk(target.parent)
        lock.unlink()


def _open_staging(staging: Path, plan: Note) -> None:
    """Keep what an earlier start of the same plan left, remove anything else."""
    file = staging / PROGRESS / PLAN
    try:
        same = json.loads(file.read_text()) == json.loads(json.dumps(plan))
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / PROGRESS).mkdir(parents=True)
        _write_note(file, plan)
    for partial in staging.glob("*.part"):
        partial.unlink()


def identity(files: Sequence[Path]) -> list[list[Any]]:
    """What tells these files from changed ones without reading them: name, size, time of the last change."""
    found = []
    for file in files:
        status = file.stat()
        found.append([file.name, status.st_size, status.st_mtime_ns])
    return found
