"""Capabilities, resource limits, readable folders, and the bond to the parent's life."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _CLEAR_ALL = 1, 38, 47, 4
_CAPABILITY_VERSION = 0x20080522
_DAC_READ_SEARCH = 1 << 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_ACCESS_ALL = (1 << 13) - 1  # every right of the first Landlock version
_ACCESS_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
_ACCESS_READ_FILE = 1 << 0 | 1 << 2


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent goes (elsewhere the end of stdin has to do).

    A process that hangs does not read, so the end of stdin alone would leave an orphan.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent went before the request
        os._exit(0)


def drop_capabilities() -> None:
    """Give up root's powers for good, but for reading files: the interpreter may lie in a folder closed to others.

    A process without them can raise no limit, trace no process that has them, and change no file of another user.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION, 0))
    data = ctypes.create_string_buffer(24)  # two times effective, permitted, inheritable
    if libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget failed")
    held = struct.unpack("6I", data.raw[:24])[1] & _DAC_READ_SEARCH
    kept = ctypes.create_string_buffer(struct.pack("6I", held, held, 0, 0, 0, 0))
    if libc.capset(header, kept) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def limit_resources(**limits: int) -> None:
    """Set soft and hard limits by their names in `resource`, e.g. `AS=2**30, CORE=0`; never above the present ones."""
    import resource  # not on every platform

    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def limit_reading(folders: Sequence[str]) -> bool:
    """Let this process read below these folders (or files) only, and write nowhere: Landlock, Linux 5.13 and later.

    Returns:
        False where the kernel has no Landlock; nothing is limited then.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(struct.pack("Q", _ACCESS_ALL), 8)
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    for folder in folders:
        try:
            descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        access = _ACCESS_READ if os.path.isdir(folder) else _ACCESS_READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, descriptor), 12)
        if libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0) != 0:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule failed for {folder}")
        os.close(descriptor)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self failed")
    os.close(rules)
    return True
