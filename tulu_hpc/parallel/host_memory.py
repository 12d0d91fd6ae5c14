"""How this process's C library keeps the memory of tensors on a CPU."""

from __future__ import annotations

import ctypes
import os

import torch

# From <malloc.h>.
M_MMAP_THRESHOLD = -3
# Smaller blocks come from the heap, which keeps freed memory: mapping them afresh would cost more than it saves.
LARGE = 4 * 2**20


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
