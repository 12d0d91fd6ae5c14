"""What the Triton backends share. Nothing here imports triton: its interpreter is chosen before the first import."""

import importlib.util
import os
from functools import cache

from torch import Tensor

from tulu_hpc.kernels.registry import USABLE, BackendError


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), which is slow and takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def status() -> str:
    """ "usable", or the reason why Triton kernels cannot run here."""
    if not _installed():
        return "triton is not installed: pip install triton (a CUDA build of torch brings it)"
    if interpreting():
        return USABLE
    import torch

    if torch.cuda.is_available():
        return USABLE
    return "torch sees no CUDA device (TRITON_INTERPRET=1 runs Triton's interpreter on the CPU, for tests)"


def check_device(op: str, tensor: Tensor) -> None:
    """Triton runs on CUDA tensors, its interpreter on CPU tensors too.

    Raises:
        BackendError: `tensor` is elsewhere.
    """
    if not tensor.is_cuda and not interpreting():
        raise BackendError(f"{op}: backend 'triton' cannot run on tensors of device {tensor.device}")
