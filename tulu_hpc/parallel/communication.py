"""Time spent in collectives, whoever calls them: torch's process groups report to a clock while it is watched.

Every collective and message of torch.distributed, megatron's and ours, is a method call of `ProcessGroup` followed by
`Work.wait`. Both are timed where they are: what overlaps with computation costs nothing between them and counts only
as far as somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

from tulu_hpc.telemetry.step_clock import StepClock

_METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)


@contextmanager
def timed_collectives(clock: StepClock) -> Iterator[None]:
    """Inside, blocking in torch.distributed is phase `communication` of `clock`."""
    targets: list[tuple[Any, str]] = [(dist.ProcessGroup, name) for name in _METHODS if name in vars(dist.ProcessGroup)]
    targets.append((dist.Work, "wait"))
    # As they lie in the class: getattr would return functions that do not bind `self` when they are put back.
    originals = [(owner, name, vars(owner)[name]) for owner, name in targets]
    for owner, name in targets:
        setattr(owner, name, _timed(getattr(owner, name), clock))
    try:
        yield
    finally:
        for owner, name, descriptor in originals:
            setattr(owner, name, descriptor)


def _timed(function: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        clock.enter("communication")
        try:
            return function(*args, **kwargs)
        finally:
            clock.leave()

    return call
