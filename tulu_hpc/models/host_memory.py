"""Large tensors on the host whose memory is cheap to touch for the first time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def host_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU.

    numpy asks the kernel for huge pages, which torch does not: a buffer that is made, filled and dropped once then
    costs 2 MiB at a time instead of 4 KiB.
    """
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(tuple(shape))
