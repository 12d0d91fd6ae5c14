"""Lets the CPU tests of the kernels run on a GPU.

Their ops are replaced by ones that take the same CPU tensors, move them to the GPU, run there on the backend that
belongs there, and move the results back to where the first argument was; autograd follows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tulu_hpc.kernels import last_backend
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan

# On a machine without a GPU: everything but the move, so that the replacement itself can be tried.
REHEARSAL = os.environ.get("TULU_HPC_GPU_REHEARSAL", "0") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"


def to_device(value: Any, device: str) -> Any:
    """`value` with every tensor in it on `device`; tuples keep their type."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, AttentionPlan):
        return value
    if isinstance(value, Mapping):
        return {key: to_device(each, device) for key, each in value.items()}
    if isinstance(value, tuple | list):
        moved = [to_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def on_gpu(op: Callable[..., Any], backends: Mapping[str, str]) -> Callable[..., Any]:
    """The op on the GPU; `backends` says which backend takes the place of the one that the CPU test names."""

    @functools.wraps(op)
    def moved(*arguments: Any, **options: Any) -> Any:
        named = options.get("backend")
        if named in backends and not REHEARSAL:
            options["backend"] = backends[named]
        if "device" in options:
            options["device"] = DEVICE
        home = next((value.device for value in arguments if isinstance(value, Tensor)), "cpu")
        return to_device(op(*to_device(arguments, DEVICE), **to_device(options, DEVICE)), str(home))

    return moved


def replace(patch: pytest.MonkeyPatch, module: ModuleType, ops: list[str], backends: Mapping[str, str]) -> None:
    """Put the moved ops, and a `last_backend` that answers in the CPU test's words, into a test module."""
    for name in ops:
        patch.setattr(module, name, on_gpu(getattr(module, name), backends))
    if hasattr(module, "last_backend"):
        words = {there: here for here, there in backends.items()}

        def asked(op: str) -> str | None:
            ran = last_backend(op)
            known = ran in ("reference", "triton") or ran in words or str(ran).startswith("flash:")
            assert REHEARSAL or known, f"{op} ran on {ran}"
            return ran if REHEARSAL else words.get(str(ran), ran)

        patch.setattr(module, "last_backend", asked)


def gpu_name() -> str:
    return "rehearsal" if REHEARSAL else torch.cuda.get_device_name()
