"""Contestants of one pass on one shape take turns, so that what disturbs the machine disturbs all of them.

A contestant is a function without arguments that returns a tensor or a tuple of tensors, or the reason why it cannot
be measured here. Those whose name starts with "ours" are this package's; the others are called peers.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.registry import USABLE, available_backends, last_backend
from tulu_hpc.kernels.timing import MIB, Run, extra_bytes, kernel_microseconds, milliseconds

OURS = "ours"
FAILED = "failed: "
_SHORT, _MANY = 5.0, 50  # a turn of a shorter call (ms) has up to so many calls
_LONG = 1000.0  # peers that take longer (ms) have two turns

Contestant = Callable[[], Any] | str


class Figures(NamedTuple):
    """Of one contestant; None where it was not measured, and then `note` says why.

    ms: the best turn. ratio: median over the turns of the baseline's time over this one's. extra_MiB: peak memory
    beyond inputs and results. error: as the caller defines it, against float64. kernel_us, launches: time inside
    kernels and their number in one call (CUDA, of calls shorter than 5 ms). backend: which of ours ran.
    """

    backend: str | None = None
    ms: float | None = None
    ratio: float | None = None
    extra_MiB: float | None = None
    error: float | None = None
    kernel_us: float | None = None
    launches: int | None = None
    note: str = ""


def backends(op: str, run: Run, names: Iterable[str] | None = None) -> dict[str, str]:
    """The backends of `op` that belong to the run's table, each with USABLE or the reason why it is not measured.

    A rehearsal has the GPU's backends too: Triton's runs where its interpreter does.
    """
    found = {}
    for name, status in available_backends(op).items():
        if (names is not None and name not in names) or (name == "cpu" and run.device != "cpu"):
            continue
        if name == "triton" and status == USABLE and triton_support.interpreting() and not run.rehearsal:
            status = "interpreted: its time means nothing (--rehearse runs it)"
        found[name] = status
    return found


def ours(op: str, run: Run, call: Callable[..., Any]) -> dict[str, Callable[..., Any] | str]:
    """A contestant for each backend of `backends`: `call` with it as `backend`, or why it is not measured."""
    return {
        f"{OURS} {name}": partial(call, backend=name) if status == USABLE else status
        for name, status in backends(op, run).items()
    }


def contest(
    run: Run,
    op: str,
    contestants: Mapping[str, Contestant],
    *,
    floors: Mapping[str, Callable[[], Any]],
    baseline: str | None,
    error: Callable[[Any], float] | None,
) -> dict[str, Figures]:
    """Figures of all floors (which have no error and no ratio) and contestants, in their order.

    A contestant that raises is noted: of ours, in a way that makes the benchmark fail in the end (`FAILED`).

    Args:
        op: of the registry; says which backend of ours ran.
        baseline: the contestant that `ratio` compares with; None: no ratios.
        error: of a result; None: not checked.
    """
    torch.compiler.reset()  # else a shape too many silently runs uncompiled
    found: dict[str, Figures] = {name: Figures() for name in floors}
    ready: dict[str, Callable[[], Any]] = dict(floors)
    for call in floors.values():
        call()
    for name, contestant in contestants.items():
        if isinstance(contestant, str):
            found[name] = Figures(note=contestant)
        elif run.skips(name):
            found[name] = Figures(note="left out by --skip")
        else:
            found[name] = _first_calls(run, op, name, contestant, error)
            if not found[name].note:
                ready[name] = contestant
    times = _turns(run, ready, baseline)
    for name, mine in times.items():
        ratio = None
        if name not in floors and baseline in times:
            ratio = statistics.median(theirs / one for theirs, one in zip(times[baseline], mine))
        found[name] = found[name]._replace(ms=min(mine), ratio=ratio)
        if run.device == "cuda" and min(mine) < _SHORT:
            kernel_us, launches = kernel_microseconds(ready[name])
            found[name] = found[name]._replace(kernel_us=kernel_us, launches=launches)
    return found


def _first_calls(
    run: Run, op: str, name: str, call: Callable[[], Any], error: Callable[[Any], float] | None
) -> Figures:
    """One call to compile and to fill workspaces, whose result is checked; another one for the memory."""
    ours = name.startswith(OURS)
    try:
        result = call()
        backend = last_backend(op) if ours else None
        wrong = None if error is None else error(result)
        del result
        return Figures(backend, extra_MiB=extra_bytes(call, run.device) / MIB, error=wrong)
    except Exception as reason:  # a peer that cannot run here is a finding
        lines = [line for line in str(reason).splitlines() if line.strip()] or [""]
        note = f"{FAILED if ours else ''}{type(reason).__name__}: {lines[0][:120]}"
    if run.device == "cuda":
        torch.cuda.empty_cache()
    return Figures(note=note)


def _turns(run: Run, ready: Mapping[str, Callable[[], Any]], baseline: str | None) -> dict[str, list[float]]:
    calls = dict.fromkeys(ready, 1)
    if not run.rehearsal:
        for name, call in ready.items():
            once = milliseconds(call, run.device)
            calls[name] = max(1, min(_MANY, int(_SHORT / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(run.turns):
        for name, call in ready.items():
            peer = name != baseline and not name.startswith(OURS)
            if turn < 2 or not peer or min(times[name]) < _LONG:
                times[name].append(milliseconds(call, run.device, calls[name]))
    return times


def lines(
    figures: Mapping[str, Figures],
    *,
    shape: Mapping[str, Any],
    unit: str,
    work: Mapping[str, float] | float,
    floors: Iterable[str],
    ceiling: float = 0.0,
) -> list[dict[str, Any]]:
    """A line of the table for each contestant.

    Args:
        shape: the columns that all of them share.
        unit: "TFLOP/s" or "GB/s".
        work: 1e12 operations or 1e9 bytes that the definition asks for, of all contestants or of each.
        ceiling: of the machine in `unit`; the roofline is the higher one of it and the fastest floor.
    """
    amount = dict.fromkeys(figures, work) if isinstance(work, float) else dict(work)
    rate = {name: 1e3 * amount[name] / max(found.ms, 1e-9) for name, found in figures.items() if found.ms is not None}
    highest = max([ceiling, *(rate[name] for name in floors)])
    result = []
    for name, found in figures.items():
        line = {**shape, "kernel": name, "backend": found.backend, "ms": found.ms, unit: rate.get(name)}
        line["roofline"] = rate[name] / highest if name in rate else None
        line |= {"ratio": found.ratio, "extra_MiB": found.extra_MiB, "error": found.error}
        line |= {"kernel_us": found.kernel_us, "launches": found.launches}
        note = found.note if not found.note or found.note.startswith(FAILED) else f"not measured: {found.note}"
        result.append(line | {"note": note})
    return result
