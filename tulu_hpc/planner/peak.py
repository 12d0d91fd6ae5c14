"""The most FLOP/s that one process could do: what MFU is a share of."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tulu_hpc.planner.hardware import GPUS

_GEMM = 1024
_REPEATS = 3


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one process, and where the figure comes from."""

    flops: float
    source: str


def peak_of_device(dtype: torch.dtype, tflops: float | None = None) -> Peak:
    """Peak of this process's device for matrix products of `dtype` (bfloat16 or float32).

    Args:
        tflops: the user's figure, which replaces everything else.
    """
    if tflops is not None:
        return Peak(tflops * 1e12, "telemetry.peak_tflops")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for gpu in GPUS.values():
            if name in gpu.device_names:
                # fp32 products here are fp32 (TF32 is never switched on).
                flops = gpu.bf16_flops if dtype == torch.bfloat16 else gpu.fp32_flops
                return Peak(flops, f"data sheet of {gpu.name}, dense, {_name(dtype)}")
        return measure(dtype, torch.device("cuda"), f"{name}, which is in no table")
    return measure(dtype, torch.device("cpu"), f"this CPU with {torch.get_num_threads()} threads")


def measure(dtype: torch.dtype, device: torch.device, what: str) -> Peak:
    """The best of a few square GEMMs; on a machine shared with others this is what is left of it at this moment."""
    size = _GEMM if device.type == "cpu" else 8 * _GEMM
    generator = torch.Generator(device).manual_seed(0)  # a run's own generators must not move
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS):
        begin = _now(device)
        torch.mm(left, right)
        best = min(best, _now(device) - begin)
    return Peak(2 * size**3 / best, f"a {_name(dtype)} GEMM of {size} x {size} measured on {what}")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
