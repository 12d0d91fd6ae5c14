"""The seccomp filter: a classic BPF program that the kernel runs before every system call of the process.

It binds root as anyone else, is inherited by children, and cannot be taken off (formats: linux/filter.h, seccomp.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Collection

try:
    from . import syscalls
except ImportError:  # loaded by child.py without the package
    import syscalls  # type: ignore[import-not-found, no-redef]

GRANTS = ("files", "network", "processes", "threads")

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def supported() -> bool:
    """Whether this machine's system calls are known here."""
    return os.uname().sysname == "Linux" and platform.machine() in _ARCHITECTURES


def _refuse(code: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


def program(grants: Collection[str], machine: str, pid: int) -> list[Instruction]:
    """The filter for a process that may do what `grants` say, beyond reading files and computing.

    Args:
        grants: of "files" (changes of the file system), "network", "processes" (children, programs, signals to others)
            and "threads".
        machine: "x86_64" or "aarch64".
        pid: the process, which may signal itself.
    """
    column, architecture = _ARCHITECTURES[machine]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER, 0, 1, syscalls.LAST_KNOWN),  # also the x32 calls of x86_64
        _refuse(errno.ENOSYS),
    ]
    refused = dict(syscalls.ALWAYS)
    refused |= {} if "files" in grants else syscalls.FILES
    refused |= {} if "network" in grants else syscalls.NETWORK
    refused |= {} if "processes" in grants else syscalls.PROCESSES | syscalls.SIGNALS
    for numbers in refused.values():
        if (number := numbers[column]) is not None:
            code += [(_JUMP_EQUAL, 0, 1, number), _refuse(errno.EPERM)]
    for name, examined in _examined(grants, pid).items():
        number = syscalls.EXAMINED[name][column]
        if number is not None:
            code += [(_JUMP_EQUAL, 0, len(examined), number), *examined]
    return [*code, (_RETURN, 0, 0, _ALLOW)]


def _examined(grants: Collection[str], pid: int) -> dict[str, list[Instruction]]:
    """What to do with a call that depends on its arguments; each ends in a verdict."""

    def argument(position: int) -> Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS + 8 * position)  # the low half: flags and pids fit

    def unless(test: Instruction, refusal: int) -> list[Instruction]:
        """Refuse where the test holds."""
        kind, _, _, constant = test
        return [(kind, 0, 1, constant), _refuse(refusal), (_RETURN, 0, 0, _ALLOW)]

    def only(constant: int) -> list[Instruction]:
        return [(_JUMP_EQUAL, 1, 0, constant), _refuse(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]

    found = {
        "prlimit64": [argument(0), *only(0)],
        "prctl": [argument(0), *unless((_JUMP_EQUAL, 0, 0, _PR_SET_PDEATHSIG), errno.EPERM)],
    }
    if "files" not in grants:
        found["open"] = [argument(1), *unless((_JUMP_SET, 0, 0, _WRITING), errno.EACCES)]
        found["openat"] = [argument(2), *unless((_JUMP_SET, 0, 0, _WRITING), errno.EACCES)]
        found["openat2"] = [_refuse(errno.ENOSYS)]  # its flags lie in memory, where a filter cannot look
    if "processes" not in grants:
        found["kill"] = found["tgkill"] = [argument(0), *only(pid)]
        found["clone3"] = [_refuse(errno.ENOSYS)]  # as openat2; libraries then use clone
        if "threads" in grants:
            found["clone"] = [argument(0), (_JUMP_SET, 1, 0, _CLONE_THREAD), _refuse(errno.EPERM), (6, 0, 0, _ALLOW)]
        else:
            found["clone"] = [_refuse(errno.EAGAIN)]
    return found


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(grants: Collection[str]) -> None:
    """Put the filter on this process and all its threads, for good.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")
    code = program(grants, platform.machine(), os.getpid())
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    loaded = _Program(len(code), packed)
    number = _SYS_SECCOMP[platform.machine()]
    if libc.syscall(number, _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(loaded)) != 0:
        raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_SET_MODE_FILTER) failed")
