"""Verifiers that misbehave, for the sandbox tests. Imported by the worker processes, and by nothing else."""

import ctypes
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

from tulu_hpc.verifiers import Verdict, register


@register("fine")
def fine(completion, truth, record):
    return Verdict(float(completion == truth), "compared")


def import_slowly():
    time.sleep(1.5)


@register("slow_import", prepare=import_slowly)
def slow_import(completion, truth, record):
    return Verdict(1.0)


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
    """Leaves a child behind that holds the pipes, and hangs."""
    if os.fork() == 0:
        time.sleep(1000)
        os._exit(0)
    time.sleep(1000)


@register("fork_bomb")
def fork_bomb(completion, truth, record):
    while True:
        os.fork()


@register("program")
def program(completion, truth, record):
    return Verdict(float(subprocess.run(["true"]).returncode == 0))


@register("write")
def write(completion, truth, record):
    with open(truth, "w") as file:
        file.write("written")
    return Verdict(1.0)


@register("delete")
def delete(completion, truth, record):
    os.unlink(truth)
    return Verdict(1.0)


@register("connect")
def connect(completion, truth, record):
    with socket.create_connection(("127.0.0.1", int(truth)), timeout=5) as connection:
        connection.sendall(b"hello")
    return Verdict(1.0)


@register("kill_parent")
def kill_parent(completion, truth, record):
    os.kill(os.getppid(), signal.SIGKILL)
    return Verdict(1.0)


@register("kill_self")
def kill_self(completion, truth, record):
    os.kill(os.getpid(), signal.SIGSEGV)


@register("detach")
def detach(completion, truth, record):
    os.setsid()
    return Verdict(1.0)


@register("outlive")
def outlive(completion, truth, record):
    """Asks not to die with its parent."""
    if ctypes.CDLL(None, use_errno=True).prctl(1, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return Verdict(1.0)


@register("raise_limit")
def raise_limit(completion, truth, record):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return Verdict(1.0)


@register("powers")
def powers(completion, truth, record):
    """The capabilities that are left."""
    with open("/proc/self/status") as file:
        left = next(line for line in file if line.startswith("CapEff")).split()[1]
    return Verdict(1.0, left)


@register("thread")
def thread(completion, truth, record):
    done = []
    worker = threading.Thread(target=done.append, args=(1,))
    worker.start()
    worker.join()
    return Verdict(float(done == [1]))


@register("fill")
def fill(completion, truth, record):
    """Ten gigabytes, a piece at a time."""
    return Verdict(float(len([bytearray(1 << 20) for _ in range(10 << 10)]) > 0))
