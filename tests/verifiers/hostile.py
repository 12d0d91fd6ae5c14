"""Verifiers that misbehave, for the sandbox tests. Imported by the worker processes, and by nothing else."""

import os
import re
import signal
import sys
import time

from tulu_hpc.verifiers import Verdict, register


@register("fine")
def fine(completion, truth, record):
    return Verdict(float(completion == truth), "compared")


@register("hang")
def hang(completion, truth, record):
    while True:
        pass


@register("stubborn")
def stubborn(completion, truth, record):
    """Hangs, and has asked not to be disturbed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(1000)


@register("exit")
def leave(completion, truth, record):
    os._exit(3)


@register("sys_exit")
def leave_politely(completion, truth, record):
    sys.exit(0)


@register("raise")
def fail(completion, truth, record):
    raise RuntimeError("no " * 10_000)


@register("recursion")
def recurse(completion, truth, record):
    return recurse(completion, truth, record)


@register("regex")
def catastrophic(completion, truth, record):
    return Verdict(float(bool(re.fullmatch(r"(a+)+$", completion))))


@register("memory")
def hungry(completion, truth, record):
    return Verdict(float(len(bytearray(1 << 40)) > 0))


@register("print")
def noisy(completion, truth, record):
    print("x" * 1_000_000)
    os.write(1, b"y" * 1_000_000)
    return Verdict(1.0)


@register("garbage")
def forge(completion, truth, record):
    """Writes to every descriptor but the standard ones, so to the private pipe too."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"\x00\x00\x00\x05hello")
        except OSError:
            continue
    return Verdict(1.0)


@register("giant")
def giant(completion, truth, record):
    """A frame header that promises 4 GB."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"\xff\xff\xff\xff")
        except OSError:
            continue
    return Verdict(1.0)


@register("score")
def wrong_score(completion, truth, record):
    return Verdict(float(truth))


@register("fork")
def fork(completion, truth, record):
    """Leaves a child behind that holds the pipes, writes its pid, and hangs."""
    pid = os.fork()
    if pid == 0:
        time.sleep(1000)
        os._exit(0)
    with open(truth, "w") as file:
        file.write(f"{os.getpid()} {pid}")
    time.sleep(1000)
