"""The seccomp program as the kernel would run it, for both machines, and its numbers against the kernel's headers."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tulu_hpc.verifiers.confinement import filters, syscalls

ALLOWED, KILLED = "allowed", "killed"
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PID = 4711
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def verdict(program, number, arguments=(), architecture=0xC000003E):
    """What a classic BPF machine makes of a system call: ALLOWED, KILLED or the errno."""
    data = {0: number, 4: architecture} | {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}
    accumulator = position = 0
    for _ in range(len(program)):
        code, if_true, if_false, constant = program[position]
        position += 1
        if code == 0x20:
            accumulator = data.get(constant, 0)
        elif code == 0x06:
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}.get(constant, constant & 0xFFFF)
        else:
            holds = {0x15: accumulator == constant, 0x25: accumulator > constant, 0x45: bool(accumulator & constant)}
            position += if_true if holds[code] else if_false
    raise AssertionError("the program does not end")


@pytest.mark.parametrize("machine", sorted(ARCHITECTURE))
def test_what_is_refused(machine):
    column = 0 if machine == "x86_64" else 1
    architecture = ARCHITECTURE[machine]

    def run(name, *arguments, grants=()):
        found = next(t[name][column] for t in vars(syscalls).values() if isinstance(t, dict) and name in t)
        return verdict(filters.program(grants, machine, PID), found, arguments, architecture)

    for table in (syscalls.FILES, syscalls.NETWORK, syscalls.PROCESSES, syscalls.SIGNALS, syscalls.ALWAYS):
        for name, numbers in table.items():
            if numbers[column] is not None:
                assert run(name) == errno.EPERM, name
    assert run("openat", 0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == ALLOWED
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND):
        assert run("openat", 0, 0, flag | os.O_CLOEXEC) == errno.EACCES
        assert run("openat", 0, 0, flag, grants=["files"]) == ALLOWED
    assert run("kill", PID, 9) == run("tgkill", PID, PID, 6) == run("prlimit64", 0) == run("prctl", 15) == ALLOWED
    for target in (0, 1, -1, PID + 1):
        assert run("kill", target, 9) == errno.EPERM
    assert run("prlimit64", 1) == run("prctl", 1) == errno.EPERM
    assert run("clone", 0x11) == run("clone", 0x10F00) == errno.EAGAIN
    assert (
        run("clone", 0x11, grants=["threads"]) == errno.EPERM and run("clone", 0x10F00, grants=["threads"]) == ALLOWED
    )
    assert run("clone3") == run("openat2") == errno.ENOSYS
    everything = {"grants": filters.GRANTS}
    for name in ("mkdirat", "socket", "execve", "clone", "clone3", "kill", "openat2", "pidfd_open"):
        assert run(name, 1, **everything) == ALLOWED, name
    assert run("ptrace", **everything) == run("setsid", **everything) == errno.EPERM
    program = filters.program((), machine, PID)
    assert verdict(program, syscalls.LAST_KNOWN + 1, (), architecture) == errno.ENOSYS
    assert verdict(program, 0x40000000 | 1, (), architecture) == errno.ENOSYS
    assert verdict(program, 1, (), 0x40000003) == KILLED
    assert verdict(program, 63 if column else 0, (), architecture) == ALLOWED  # read


@pytest.mark.parametrize("machine", sorted(HEADERS))
def test_numbers(machine):
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]}")
    text = HEADERS[machine].read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    column = 0 if machine == "x86_64" else 1
    checked = 0
    for table in (t for t in vars(syscalls).values() if isinstance(t, dict) and "__name__" not in t):
        for name, numbers in table.items():
            if numbers[column] is not None and name in known:
                assert known[name] == numbers[column], name
                checked += 1
            if numbers[column] is None:
                assert name not in known, name
    assert checked > 80
