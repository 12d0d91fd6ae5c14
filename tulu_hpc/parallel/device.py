"""Which device and which communication backend this process uses."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """This process's CUDA device (LOCAL_RANK under torchrun), or the CPU where there is no CUDA."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def default_backend() -> str:
    """`nccl` with CUDA, `gloo` without."""
    return "nccl" if torch.cuda.is_available() else "gloo"
