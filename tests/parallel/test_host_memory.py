"""What is freed is not kept, in processes of their own: the settings cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from tulu_hpc.kernels.linear_logprob import onednn

RESIDENT = """
import sys, torch
if sys.argv[1] == "set":
    import tulu_hpc.parallel

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
"""
TENSORS = (
    RESIDENT
    + """
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
)


PRODUCTS = (
    RESIDENT
    + """
from tulu_hpc.kernels.linear_logprob import onednn
rows, weight = torch.ones(400, 256), torch.ones(256, 512)
onednn.product(rows, weight)
before = resident()
for count in range(40, 400):
    onednn.product(rows[:count], weight)
print(resident() - before)
"""
)


def growth(program: str, argument: str) -> float:
    """MiB; the program does not inherit what this process has set for itself."""
    names = ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", program, argument], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout)


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or platform.libc_ver()[0] != "glibc", reason="settings for CPUs, one of them of glibc"
)


def test_only_what_lives_is_resident() -> None:
    assert growth(TENSORS, "set") < 20 < 60 < growth(TENSORS, "leave")


@pytest.mark.skipif(not onednn.available(), reason="needs oneDNN")
def test_products_of_many_shapes_are_not_kept() -> None:
    assert growth(PRODUCTS, "set") < 0.5 * growth(PRODUCTS, "leave")
