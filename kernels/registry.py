"""Which backends an op has, which of them can run here, and which one ran last."""

import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")

USABLE = "usable"


class BackendError(RuntimeError):
    """A named backend does not exist or cannot run here; the message says why and what would help."""


class LossOutput(NamedTuple):
    """`loss`: scalar fp32 sum; `metrics`: detached scalar sums under the names that trainers log."""

    loss: Tensor
    metrics: dict[str, Tensor]


# op -> backend -> a function that returns USABLE or the reason why the backend cannot run on this machine.
_probes: dict[str, dict[str, Callable[[], str]]] = {}
_last: dict[str, str] = {}


def register(op: str, backends: dict[str, Callable[[], str]]) -> None:
    """Declares the backends of `op`, each with its probe."""
    _probes[op] = backends


def _backends(op: str) -> dict[str, Callable[[], str]]:
    if op not in _probes:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(sorted(_probes))}")
    return _probes[op]


def available_backends(op: str) -> dict[str, str]:
    """Every backend of `op` with "usable" or the reason why it cannot run on this machine.

    Raises:
        ValueError: there is no such op.
    """
    return {name: probe() for name, probe in _backends(op).items()}


def last_backend(op: str) -> str | None:
    """The backend that the latest call of `op` in this process ran on, None before the first call.

    Raises:
        ValueError: there is no such op.
    """
    _backends(op)
    return _last.get(op)


def record(op: str, backend: str) -> None:
    """Called by an op's implementation, at the moment it runs on `backend`."""
    _last[op] = backend


def constant(function: Callable[..., T]) -> Callable[..., T]:
    """Tells torch.compile to call the function while it traces and to keep the answer.

    torch.compiler.assume_constant_result, which does just this, imports the whole compiler: 90 MiB for every process.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def choose(op: str, requested: str | None, default: str) -> str:
    """The backend to run: the requested one, else that of TULU_HPC_<OP>_BACKEND, else `default`.

    Raises:
        BackendError: it does not exist or cannot run here.
    """
    variable = f"TULU_HPC_{op.upper()}_BACKEND"
    name = requested or os.environ.get(variable) or default
    probes = _backends(op)
    if name not in probes:
        raise BackendError(f"{op} has no backend {name!r}; it has {', '.join(probes)}")
    reason = probes[name]()
    if reason != USABLE:
        raise BackendError(f"{op}: backend {name!r} cannot run: {reason}")
    return name
