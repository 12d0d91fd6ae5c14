"""A file system of a few kilobytes that only one process and its children see: disks that really are full."""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 0x20000, 0x20, 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


class MountRefused(RuntimeError):
    """This user may not mount a file system of its own."""


def on_small_disk(mount_point: Path, size: int, function: Callable[[], Any]) -> Any:
    """Call `function` in a forked process in which `mount_point` (a directory) is a tmpfs of `size` bytes.

    Raises:
        MountRefused: not permitted here.
        AssertionError: `function` raised; with its traceback.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            _mount(mount_point, size)
            answer = (True, function())
        except BaseException as error:
            answer = (False, error if isinstance(error, MountRefused) else traceback.format_exc())
        with os.fdopen(writer, "wb") as stream:
            pickle.dump(answer, stream)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        fine, value = pickle.load(stream)
    os.waitpid(pid, 0)
    if fine:
        return value
    if isinstance(value, MountRefused):
        raise value
    raise AssertionError(value)


def resize(mount_point: Path, size: int) -> None:
    """Give the disk another size, within `function`."""
    _call("mount", None, os.fsencode(mount_point), None, _MS_REMOUNT, f"size={size}".encode())


def _mount(mount_point: Path, size: int) -> None:
    _call("unshare", _CLONE_NEWNS)
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)  # else the mount would show everywhere
    _call("mount", b"tmpfs", os.fsencode(mount_point), b"tmpfs", 0, f"size={size}".encode())


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise MountRefused(f"{name}: {os.strerror(ctypes.get_errno())}")
