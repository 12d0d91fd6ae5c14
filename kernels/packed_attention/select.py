"""Which backend takes which tensors, which one runs by default, and why.

Shapes: D head dim.
"""

from typing import NamedTuple

import torch

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.packed_attention import flash, triton_backend
from tulu_hpc.kernels.registry import USABLE

BACKENDS = ("reference", "cpu", "triton", flash.NAME, *flash.NAMED)


class Choice(NamedTuple):
    """A backend, the reason, and whether the user should be warned about it."""

    backend: str
    reason: str
    warn: bool = False


def refusal(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `backend` does not take such tensors, None if it does. Whether it can run at all is asked elsewhere."""
    if backend == "cpu" and device_type != "cpu":
        return f"cannot run on tensors of device {device_type}"
    if backend == flash.NAME or backend in flash.NAMED:
        if device_type != "cuda":
            return f"cannot run on tensors of device {device_type}"
        return flash.refusal(dtype, head_dim, backend.partition(":")[2] or None)
    if backend == "triton":
        if device_type != "cuda" and not triton_support.interpreting():
            return f"cannot run on tensors of device {device_type}"
        return triton_backend.refusal(dtype, head_dim)
    return None


def default(device_type: str, dtype: torch.dtype, head_dim: int) -> Choice:
    """The backend when nobody names one."""
    if device_type != "cuda":
        return Choice("cpu", f"the default on {device_type}")
    no_flash = flash.refusal(dtype, head_dim)
    if no_flash is None:
        # A library that is installed and broken is no reason to run another one: naming it raises.
        return Choice(flash.NAME, f"the default on cuda for {dtype} and head dim {head_dim}")
    no_triton = triton_backend.refusal(dtype, head_dim)
    if no_triton is None and triton_support.status() == USABLE:
        return Choice("triton", f"flash {no_flash}")
    no_triton = no_triton or f"is missing: {triton_support.status()}"
    return Choice("reference", f"flash {no_flash}; triton {no_triton}", warn=True)
