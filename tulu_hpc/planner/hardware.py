"""GPU memory sizes and peak speeds."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: what the driver reports as total (`nvidia-smi --query-gpu=memory.total`).

    bf16_flops, fp32_flops: FLOP/s of dense matrix products, from NVIDIA's data sheets (which quote tensor cores with
    2:4 sparsity: half of that; fp32 without TF32); nan where unknown. device_names: as torch.cuda.get_device_name says.
    """

    name: str
    memory_bytes: int
    bf16_flops: float = math.nan
    fp32_flops: float = math.nan
    device_names: tuple[str, ...] = ()


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40960 * MIB, 312e12, 19.5e12, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
        Gpu("a100", 81920 * MIB, 312e12, 19.5e12, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
        Gpu("h100", 81559 * MIB, 989.5e12, 67e12, ("NVIDIA H100 80GB HBM3",)),
        Gpu("h200", 143771 * MIB, 989.5e12, 67e12, ("NVIDIA H200",)),
        Gpu("b200", 183359 * MIB, 2250e12, 75e12, ("NVIDIA B200",)),
        Gpu("l40s", 46068 * MIB, 362.05e12, 91.6e12, ("NVIDIA L40S",)),
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
