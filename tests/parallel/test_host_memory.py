"""Freed memory of large tensors goes back to the system, in a process of its own: the setting cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys, torch
if sys.argv[1] == "set":
    import tulu_hpc.parallel

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024

big = torch.ones(7 * 2**20)  # unset, the C library learns from the first large one that is freed to keep such blocks
del big
before = resident()
tensors, pins = [], []
for _ in range(10):
    tensors.append(torch.ones(2 * 2**20))  # 8 MiB
    pins.append(torch.ones(2**17))  # above it, so that the heap cannot shrink
tensors.clear()
print(resident() - before)
"""


def growth(argument: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM, argument], check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available() or platform.libc_ver()[0] != "glibc", reason="a setting of glibc on CPUs")
def test_only_what_lives_is_resident() -> None:
    assert growth("set") < 20 < 60 < growth("leave")
