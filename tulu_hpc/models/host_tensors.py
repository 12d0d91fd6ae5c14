"""Large tensors on the host whose memory is cheap to touch for the first time and goes back to the system at once."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def host_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU.

    A large one has pages of its own, huge ones where the kernel has them: a buffer that is made, filled and dropped
    once otherwise costs more in page faults than in copying, and malloc may keep it after it was dropped.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))  # the pages live as long as the tensor
