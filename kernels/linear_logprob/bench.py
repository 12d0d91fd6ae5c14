"""Benchmark of linear_logprob beside F.linear + log_softmax + gather, other libraries, and the bare GEMM as the floor.

    python -m tulu_hpc.kernels.linear_logprob.bench [--quick] [--json PATH]

Shapes: N rows, H hidden, V vocabulary; `valid` is the share of rows whose target is not ignored. The contenders of a
shape take turns. Columns:
    ms         best: CPU seconds of the process per thread on CPU (other programs disturb them less), else device time
    ratio      median over the turns of the baseline's time, on all rows, over this one's
    roofline   time that the products of the valid rows need at the GEMM speed measured in the same run, over ms: one
               product forward, 3 with the backward pass while logits are kept (6NHV), 4 beyond (8NHV)
               On CPU that GEMM is torch.mm (MKL), as in the baseline; our `cpu` backend multiplies with oneDNN, so
               values above 1, and much of its ratio, are the difference between the two libraries
    extra_MiB  peak of allocated memory beyond the inputs and the returned gradients; memory: share of the baseline's
    error      largest error of 16 log-probs against float64
"speed" keeps the logits for the backward pass, "memory" has a small buffer, "invariant" is batch-invariant.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels import available_backends
from tulu_hpc.kernels.linear_logprob import peers
from tulu_hpc.kernels.linear_logprob.ops import linear_logprob
from tulu_hpc.kernels.registry import USABLE
from tulu_hpc.kernels.timing import report

MIB = 2**20


class Shape(NamedTuple):
    """One set of lines. speed, memory: buffers in MiB; peers: whether other libraries are measured too."""

    rows: int
    hidden: int
    vocab: int
    valid: float
    speed: int
    memory: int
    peers: bool
    repeats: int


QUICK = [Shape(256, 128, 8000, 1.0, 256, 1, True, 3), Shape(256, 128, 8000, 0.5, 256, 1, False, 3)]
FULL = [
    Shape(512, 1024, 128256, 1.0, 300, 16, True, 3),
    Shape(512, 1024, 128256, 0.5, 300, 16, False, 3),
    Shape(512, 2048, 128256, 1.0, 300, 16, False, 3),
    Shape(512, 2048, 128256, 0.5, 300, 16, False, 3),
]
# The heads of Llama 3.1 8B, 70B and 405B: whole, and the shard of 8 tensor-parallel ranks.
FULL_CUDA = [
    Shape(8192, hidden, vocab, valid, 4608 if vocab == 128256 else 600, 512 if vocab == 128256 else 128, True, 10)
    for hidden in (4096, 8192, 16384)
    for vocab in (128256, 16032)
    for valid in (1.0, 0.5, 0.3)
]


def once(function: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call, in this process on CPU."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))
    before = time.process_time()
    function()
    return 1e3 * (time.process_time() - before) / torch.get_num_threads()


def extra_bytes(function: Callable[[], Any], device: str) -> int:
    """Peak of the memory allocated during a call, without what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        activity = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
            result = function()
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        alive = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
    returned = result if isinstance(result, tuple) else (result,)
    return peak - sum(x.numel() * x.element_size() for x in returned)


def oracle(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    """Log-probs in float64, the weight widened piece by piece."""
    logits = torch.cat([hidden_NH.double() @ piece.double().T for piece in weight_VH.split(8192)], 1)
    logprobs = logits.log_softmax(-1).gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    return logprobs.where(target_N >= 0, 0)


def gemm_milliseconds(hidden_NH: Tensor, weight_VH: Tensor, device: str, repeats: int) -> float:
    """One product of the shape into memory that is there already: the GEMM ceiling."""
    out = hidden_NH.new_empty(len(hidden_NH), len(weight_VH))
    return min(once(lambda: torch.mm(hidden_NH, weight_VH.T, out=out), device) for _ in range(repeats + 1))


def contenders(shape: Shape, device: str) -> dict[str, tuple[peers.Peer, int]]:
    """Functions of (hidden, weight, target), each with its number of products in forward and backward together."""

    def ours(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        return linear_logprob(hidden, weight, target, **options).logprobs_K

    found: dict[str, tuple[peers.Peer, int]] = {
        "dense": (peers.dense, 3),
        "ours speed": (partial(ours, max_buffer_bytes=shape.speed * MIB), 3),
        "ours memory": (partial(ours, max_buffer_bytes=shape.memory * MIB), 4),
    }
    if device == "cuda" and available_backends("linear_logprob")["triton"] == USABLE:
        found["ours triton"] = (partial(ours, backend="triton"), 4)
    found["ours invariant"] = (partial(ours, max_buffer_bytes=shape.speed * MIB, batch_invariant=True), 3)
    if shape.peers:
        found |= {name: (peer, 3) for name, peer in peers.available().items()}
    return found


def measure(shape: Shape, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The lines of one shape; a contender that fails has its error in their place."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(shape.rows, shape.hidden, generator=generator).to(device, dtype).requires_grad_()
    w = torch.randn(shape.vocab, shape.hidden, generator=generator).mul_(shape.hidden**-0.5).to(device, dtype)
    w.requires_grad_()
    target = torch.randint(0, shape.vocab, (shape.rows,), generator=generator)
    ignored = torch.randperm(shape.rows, generator=generator)[: round(shape.rows * (1 - shape.valid))]
    all_targets, target = target.to(device), target.index_fill(0, ignored, -100).to(device)
    grad = torch.randn(shape.rows, generator=generator).to(device)
    found = contenders(shape, device)
    sample = slice(0, 16)
    with torch.no_grad():
        exact = oracle(h[sample], w, target[sample])
        gemm_ms = gemm_milliseconds(h, w, device, shape.repeats)
    lines: list[dict[str, Any]] = []
    for step in ("forward", "both"):

        def call(name: str, step: str = step) -> Any:
            # The baseline does not know which rows are ignored before it is too late: it computes all of them.
            ids = all_targets if name == "dense" else target
            if step == "forward":
                with torch.no_grad():
                    return found[name][0](h, w, ids)
            return torch.autograd.grad(found[name][0](h, w, ids), (h, w), grad)

        times: dict[str, list[float]] = {name: [] for name in found}
        extra: dict[str, int] = {}
        failed: dict[str, str] = {}
        for name in found:
            try:
                extra[name] = extra_bytes(partial(call, name), device)
            except Exception as error:  # a peer that cannot run here is a finding
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        for turn in range(shape.repeats):
            for name in found:
                if name not in failed and (turn < 2 or name == "dense" or name.startswith("ours")):
                    times[name].append(once(partial(call, name), device))
        for name, (function, products) in found.items():
            line: dict[str, Any] = {"N": shape.rows, "H": shape.hidden, "V": shape.vocab, "valid": shape.valid}
            line |= {"pass": step, "kernel": name}
            if name in failed:
                line |= dict.fromkeys(("ms", "ratio", "roofline", "extra_MiB", "memory", "error"))
                lines.append(line | {"note": failed[name]})
                continue
            rows = shape.valid if name != "dense" else 1.0
            line["ms"] = min(times[name])
            line["ratio"] = statistics.median(d / mine for d, mine in zip(times["dense"], times[name]))
            line["roofline"] = (1 if step == "forward" else products) * rows * gemm_ms / line["ms"]
            line["extra_MiB"] = extra[name] / MIB
            line["memory"] = extra[name] / extra["dense"]
            with torch.no_grad():
                mine = function(h[sample], w, target[sample])
            line["error"] = float((mine.double() - exact).abs().max())
            lines.append(line | {"note": ""})
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    shapes = QUICK if options.quick else FULL_CUDA if cuda else FULL
    dtype = torch.bfloat16 if cuda else torch.float32
    lines = [line for shape in shapes for line in measure(shape, "cuda" if cuda else "cpu", dtype)]
    report("linear_logprob", lines, options.json)


if __name__ == "__main__":
    main()
