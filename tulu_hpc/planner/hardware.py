"""GPU memory sizes."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: what the driver reports as total (`nvidia-smi --query-gpu=memory.total`)."""

    name: str
    memory_bytes: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40960 * MIB),
        Gpu("a100", 81920 * MIB),
        Gpu("h100", 81559 * MIB),
        Gpu("h200", 143771 * MIB),
        Gpu("b200", 183359 * MIB),
        Gpu("l40s", 46068 * MIB),
    )
}

# CUDA context, NCCL buffers and allocator fragmentation: no formula gives them. An allowance, not measured.
RESERVED_BYTES = 4 * GIB


def find_gpu(text: str) -> Gpu:
    """A GPU by name, or a memory size in GiB such as `80`.

    Raises:
        ValueError: neither; names the nearest.
    """
    name = text.strip().lower()
    if name in GPUS:
        return GPUS[name]
    try:
        gib = float(name.removesuffix("gib"))
    except ValueError:
        near = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--gpu {text!r}: unknown{hint} (known: {', '.join(GPUS)}, or a number of GiB)") from None
    if not (math.isfinite(gib) and gib > 0):
        raise ValueError(f"--gpu {text!r}: need a number of GiB above 0")
    return Gpu(f"{gib:g} GiB", int(gib * GIB))
