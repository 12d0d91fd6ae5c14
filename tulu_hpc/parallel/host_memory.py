"""What is kept of tensors on a CPU that are gone: blocks of the C library, primitives of oneDNN."""

from __future__ import annotations

import ctypes
import os

import torch

# From <malloc.h>.
M_MMAP_THRESHOLD = -3
# Smaller blocks come from the heap, which keeps freed memory: mapping them afresh would cost more than it saves.
LARGE = 4 * 2**20
# A pack needs about 16: four linear layers and the head, three products each. Another pack has other rows.
PRIMITIVES = 24


def return_large_tensors() -> bool:
    """Give memory of large CPU tensors back to the system when they are freed; a no-op with CUDA and without glibc.

    Packs differ in rows, so a freed activation rarely has the size of the next one and the heap grows around the holes.
    torch asks for huge pages from then on, which make fresh memory cheap.

    Returns:
        Whether the C library obeyed.
    """
    if torch.cuda.is_available():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE))


def bound_primitive_caches() -> None:
    """Let oneDNN keep the primitives of a few shapes only; a no-op with CUDA.

    It makes one for every shape of a matrix product, of 0.6 MiB, in half a millisecond. Two caches (its own and that of
    torch's wrapper) hold 1024 of them each by default, and packs differ in rows.
    """
    if torch.cuda.is_available():
        return
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
        os.environ.setdefault(name, str(PRIMITIVES))
