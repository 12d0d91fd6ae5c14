"""What the kernel benchmarks share: their arguments, clocks, peak memory, and the ceilings of the machine."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tulu_hpc.kernels.linear_logprob import onednn

# The profiler, which counts memory on the CPU, else prints two lines to stderr for each of its runs.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

MIB = 2**20
FULL, QUICK, REHEARSAL = "full", "quick", "rehearsal"
_TURNS = {FULL: 5, QUICK: 3, REHEARSAL: 1}


class Labelled(Protocol):
    """A shape of a benchmark's table."""

    @property
    def label(self) -> str: ...


Shape = TypeVar("Shape", bound=Labelled)


class Tables(NamedTuple, Generic[Shape]):
    """The shapes of a benchmark on either device, and how one of the GPU's shrinks for the rehearsal."""

    cpu: Sequence[Shape]
    cpu_quick: Sequence[Shape]
    cuda: Sequence[Shape]
    cuda_quick: Sequence[Shape]
    shrink: Callable[[Shape], Shape]


@dataclass(frozen=True)
class Run:
    """How a benchmark was asked to run.

    device: "cpu" or "cuda". dtype: of activations and weights. mode: FULL, QUICK or REHEARSAL, which walks the GPU's
    table on the CPU at small shapes: its figures mean nothing. skip: contestants whose name contains one of these are
    not measured; only: nor are shapes without it in their label. gemm: TFLOP/s of the fastest square product; copy:
    GB/s, read and written, of a copy larger than the caches.
    """

    device: str
    dtype: torch.dtype
    mode: str
    skip: tuple[str, ...] = ()
    only: str = ""
    json: Path | None = None
    markdown: Path | None = None
    gemm: float = 0.0
    copy: float = 0.0

    @property
    def rehearsal(self) -> bool:
        return self.mode == REHEARSAL

    @property
    def turns(self) -> int:
        return _TURNS[self.mode]

    def skips(self, name: str) -> bool:
        """Whether a contestant is left out."""
        return any(word in name for word in self.skip)

    def table(self, tables: Tables[Shape]) -> list[Shape]:
        """The shapes to measure; the rehearsal's are those of the GPU, shrunk.

        Raises:
            SystemExit: none has `only` in its label.
        """
        if self.rehearsal:
            shapes = [tables.shrink(shape) for shape in tables.cuda]
        elif self.device == "cuda":
            shapes = list(tables.cuda_quick if self.mode == QUICK else tables.cuda)
        else:
            shapes = list(tables.cpu_quick if self.mode == QUICK else tables.cpu)
        found = [shape for shape in shapes if self.only in shape.label]
        if not found:
            raise SystemExit(f"no shape has {self.only!r} in its label: {', '.join({s.label: 0 for s in shapes})}")
        return found


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has; a benchmark may add its own."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    mode = found.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="few or small shapes, few repetitions")
    mode.add_argument(
        "--rehearse",
        action="store_true",
        help="the GPU's table on the CPU at small shapes: tries the script, not speed",
    )
    found.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a device")
    found.add_argument(
        "--skip", action="append", default=[], metavar="WORD", help="leave out contestants with WORD in their name"
    )
    found.add_argument("--only", default="", metavar="WORD", help="only the shapes with WORD in their label")
    found.add_argument("--json", type=Path, metavar="PATH", help="write the JSON object here as well")
    found.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables as Markdown here")
    return found


def start(options: argparse.Namespace) -> Run:
    """The run that `options` of `parser` ask for, with the ceilings measured.

    Raises:
        SystemExit: --device cuda without one, or with --rehearse.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    if device == "cuda" and options.rehearse:
        raise SystemExit("--rehearse runs on the CPU; leave out --device cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    mode = REHEARSAL if options.rehearse else QUICK if options.quick else FULL
    # The rehearsal walks what the GPU runs, so in the GPU's dtype.
    dtype = torch.float32 if device == "cpu" and mode != REHEARSAL else torch.bfloat16
    run = Run(device, dtype, mode, tuple(options.skip), options.only, options.json, options.markdown)
    return replace(run, gemm=gemm_tflops(run), copy=copy_gigabytes(run))


# ------------------------------------------------------------------------------------------------ clocks
def milliseconds(function: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Of one of `calls` calls: CPU seconds of the process per thread on CPU (other programs disturb them less than the
    wall clock), time between two events on CUDA, which has in it what Python takes to launch."""
    if device == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(calls):
            function()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / calls
    before = time.process_time()
    for _ in range(calls):
        function()
    return 1e3 * (time.process_time() - before) / torch.get_num_threads() / calls


def best_milliseconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Best of `repeats` after one warm-up."""
    function()
    return min(milliseconds(function, device) for _ in range(repeats))


def kernel_microseconds(function: Callable[[], Any]) -> tuple[float, int]:
    """(time inside CUDA kernels, number of launches) of one call; copies and fills count, annotations do not."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            function()
        torch.cuda.synchronize()
    # torch.compile marks its regions, which the profiler then also shows as one long event on the device.
    events = [
        event
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(event.time_range.elapsed_us() for event in events) / 10, len(events) // 10


# ------------------------------------------------------------------------------------------------ memory
def extra_bytes(function: Callable[[], Any], device: str) -> int:
    """Peak of the memory allocated during a call, without what it returns (a tensor or a tuple of tensors)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        alive = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
    returned = result if isinstance(result, tuple) else (result,)
    return max(0, peak - sum(x.nbytes for x in returned))


# ------------------------------------------------------------------------------------------------ ceilings
def products(a_MK: Tensor, b_NK: Tensor) -> dict[str, Callable[[], Any]]:
    """a @ b^T by every GEMM library that runs here: the floors of ops that are mostly products."""
    out_MN = a_MK.new_empty(len(a_MK), len(b_NK))
    found: dict[str, Callable[[], Any]] = {"GEMM (torch.mm)": lambda: torch.mm(a_MK, b_NK.T, out=out_MN)}
    if a_MK.device.type == "cpu" and onednn.available() and onednn.suits(a_MK, b_NK.T):
        found["GEMM (oneDNN)"] = lambda: onednn.product(a_MK, b_NK.T)
    return found


def copying(bytes_moved: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes `bytes_moved` in all: the floor of ops that are bound by memory."""
    source = torch.ones(max(1, bytes_moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def gemm_tflops(run: Run) -> float:
    """TFLOP/s of the fastest square product of the run's dtype."""
    sizes = [64] if run.rehearsal else [4096, 8192] if run.device == "cuda" else [512, 1024]
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=run.device).to(run.dtype)
        for product in products(a, a).values():
            best = max(best, 2e-9 * size**3 / best_milliseconds(product, run.device, run.turns))
    return best


def copy_gigabytes(run: Run) -> float:
    """GB/s, read and written, of a copy much larger than the caches."""
    moved = 2**20 if run.rehearsal else 2**31 if run.device == "cuda" else 2**27
    return 1e-6 * moved / best_milliseconds(copying(moved, run.device), run.device, run.turns)
