"""The compiled core: loaded on first use, so that the package imports without it."""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

from tulu_hpc.kernels.registry import USABLE, BackendError

_HOW = "build it with `pip install -e .` in the source directory, or choose backend='reference' (slower)"


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("tulu_hpc.kernels._core"), USABLE
    except ImportError as error:
        return None, f"the compiled core tulu_hpc.kernels._core is not built or does not load ({error}); {_HOW}"


def core() -> Any:
    """The extension module tulu_hpc.kernels._core.

    Raises:
        BackendError: it is not built, or does not load; the message says how to build it.
    """
    module, reason = _load()
    if module is None:
        raise BackendError(reason)
    return module


def core_status() -> str:
    """ "usable", or the reason why the compiled core does not load."""
    return _load()[1]


def cuda_status() -> str:
    """ "usable" when the core has its CUDA kernels and torch sees a device, else the reason."""
    module, reason = _load()
    if module is None:
        return reason
    if not module.build_info()["cuda"]:
        return "the compiled core has no CUDA kernels; rebuild it where nvcc is, with TULU_HPC_CUDA=ON pip install -e ."
    import torch

    return USABLE if torch.cuda.is_available() else "torch sees no CUDA device"


def build_info() -> dict[str, Any]:
    """What the compiled core holds: `cuda` (bool), `cuda_architectures`, `openmp` (bool), `cpu_isas`, `compiler`.

    Raises:
        BackendError: the core is not built.
    """
    return dict(core().build_info())


def check(code: int, what: str) -> None:
    """Raises RuntimeError with the core's own message when a core function returned a non-zero code."""
    if code:
        raise RuntimeError(f"{what} failed: {core().error_string(code)} (code {code})")
