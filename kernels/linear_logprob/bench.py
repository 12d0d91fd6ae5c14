"""Benchmark of linear_logprob beside F.linear + log_softmax + gather, other libraries, and the bare GEMM as the floor.

    python -m tulu_hpc.kernels.linear_logprob.bench [--quick | --rehearse] [--json PATH] [--markdown PATH]

Columns:
    shape      the model's head, whole or the shard of 8 tensor-parallel ranks; N rows, H hidden, V vocabulary
    valid      share of the rows whose target is not ignored
    pass       forward; both: with the gradients of hidden and weight
    ms         best turn: CPU seconds of the process per thread on CPU, else device time
    products   of N x H x V that are counted: one forward; with the backward pass 3 (6NHV) where logits are kept, 4
               (8NHV) where they are computed again, 5 (10NHV) in Triton, where both gradients compute them again
    TFLOP/s    those products of the valid rows. Dense multiplies all rows: it knows them too late
    roofline   TFLOP/s over those of the fastest GEMM measured in the same run: torch.mm (on CPU also oneDNN) at the
               shape, or a square one
    ratio      median over the turns of the baseline's time, on all rows, over this one's
    extra_MiB  peak of allocated memory beyond the inputs and the returned gradients; memory: share of the baseline's
    error      against float64, of 16 rows: largest of the log-probs; both: largest of the gradients of hidden over the
               largest gradient (bf16 rounds it to 4e-3)
"speed" keeps the logits for the backward pass, "memory" has a small buffer (few valid rows may fit it: 3 products),
"invariant" is batch-invariant.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels import timing
from tulu_hpc.kernels.bench_report import Goal, Line, launch, one, select, worst
from tulu_hpc.kernels.contest import OURS, Contestant, backends, contest, lines
from tulu_hpc.kernels.linear_logprob import buffers, onednn, peers
from tulu_hpc.kernels.linear_logprob.ops import linear_logprob
from tulu_hpc.kernels.registry import USABLE
from tulu_hpc.kernels.timing import MIB, Run, Tables

OP = "linear_logprob"
BASELINE, SPEED, MEMORY = "dense", "ours speed", "ours memory"
SAMPLE = 16  # rows whose log-probs are checked


class Shape(NamedTuple):
    """One set of lines. speed, memory: buffers in MiB."""

    label: str
    rows: int
    hidden: int
    vocab: int
    valid: float
    speed: float
    memory: float


CPU_QUICK = [Shape("small", 256, 128, 8000, valid, 256, 1) for valid in (1.0, 0.5, 0.3)]
CPU = [
    Shape(f"H {hidden}", 512, hidden, 128256, valid, 300, 16)
    for hidden, fractions in ((1024, (1.0, 0.5, 0.3)), (2048, (1.0, 0.5)))
    for valid in fractions
]
SPEED_MIB, MEMORY_MIB = {1: 4608, 8: 600}, {1: 1024, 8: 300}  # by the number of tensor-parallel ranks


def _head(model: str, hidden: int, tp: int, valid: float) -> Shape:
    return Shape(f"{model} tp {tp}", 8192, hidden, 128256 // tp, valid, SPEED_MIB[tp], MEMORY_MIB[tp])


# The heads of Llama 3.1 8B, 70B and 405B: whole, and the shard of 8 tensor-parallel ranks.
CUDA = [
    _head(model, hidden, tp, valid)
    for model, hidden in (("8B", 4096), ("70B", 8192), ("405B", 16384))
    for tp in (1, 8)
    for valid in (1.0, 0.5, 0.3)
]
CUDA_QUICK = [shape for shape in CUDA if shape.valid == 0.5 and shape.hidden != 8192]


def shrink(shape: Shape) -> Shape:
    """A 256th of every side but the rows, of which 32 are left; buffers in proportion, but not without any block."""
    rows, vocab = 32, shape.vocab // 256
    part = rows * vocab / (shape.rows * shape.vocab)
    speed, memory = max(1.0, shape.speed * part), max(0.01, shape.memory * part)
    return Shape(shape.label, rows, shape.hidden // 256, vocab, shape.valid, speed, memory)


TABLES = Tables(CPU, CPU_QUICK, CUDA, CUDA_QUICK, shrink)


def oracle(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, grad_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient of hidden in float64, the weight widened piece by piece."""
    pieces = weight_VH.split(8192)
    logprobs_NV = torch.cat([hidden_NH.double() @ piece.double().T for piece in pieces], 1).log_softmax(-1)
    expected_NH = weight_VH[target_N].double()
    for p_N, piece in zip(logprobs_NV.exp().split(8192, 1), pieces):
        expected_NH -= p_N @ piece.double()
    return logprobs_NV.gather(1, target_N[:, None])[:, 0], grad_N.double()[:, None] * expected_NH


def ignored(shape: Shape) -> int:
    """Rows whose target is ignored."""
    return round(shape.rows * (1 - shape.valid))


def products(shape: Shape, run: Run, mebibytes: float) -> int:
    """Of our GEMMs in forward and backward together, with a buffer of that size."""
    cpu = run.device == "cpu"
    used = shape.rows - ignored(shape)
    sizes = buffers.Sizes(
        used,
        shape.hidden,
        shape.vocab,
        run.dtype.itemsize,
        not cpu,
        cpu and onednn.available(),
        picked=used < shape.rows,
    )
    return 3 if buffers.keeps_logits(sizes, int(mebibytes * MIB)) else 4


def contestants(shape: Shape, run: Run) -> dict[str, tuple[peers.Peer | str, int]]:
    """Functions of (hidden, weight, target), each with its number of products in forward and backward together."""

    def ours(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        return linear_logprob(hidden, weight, target, **options).logprobs_K

    found: dict[str, tuple[peers.Peer | str, int]] = {
        BASELINE: (peers.dense, 3),
        SPEED: (partial(ours, max_buffer_bytes=int(shape.speed * MIB)), products(shape, run, shape.speed)),
        MEMORY: (partial(ours, max_buffer_bytes=int(shape.memory * MIB)), products(shape, run, shape.memory)),
    }
    triton = backends(OP, run)["triton"]
    found[f"{OURS} triton"] = (partial(ours, backend="triton") if triton == USABLE else triton, 5)
    # On CUDA it is Triton's, which keeps no logits.
    invariant = partial(ours, max_buffer_bytes=int(shape.speed * MIB), batch_invariant=True)
    found[f"{OURS} invariant"] = (invariant, 5 if run.device == "cuda" else products(shape, run, shape.speed))
    return found | {name: (peer, 3) for name, peer in peers.table().items()}


def measure(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """The lines of one shape."""
    device = run.device
    generator = torch.Generator(device).manual_seed(0)
    new = partial(torch.randn, generator=generator, device=device, dtype=run.dtype)
    h, w = new(shape.rows, shape.hidden), new(shape.vocab, shape.hidden).mul_(shape.hidden**-0.5)
    h.requires_grad_(), w.requires_grad_()
    every = torch.randint(0, shape.vocab, (shape.rows,), generator=generator, device=device)
    # Which rows are ignored is random, but the first is not: some row of the sample has to be there.
    order = torch.randperm(shape.rows - 1, generator=generator, device=device) + 1
    target = every.index_fill(0, order[: ignored(shape)], -100)
    grad = torch.randn(shape.rows, generator=generator, device=device)
    with torch.no_grad():
        exact, exact_gradient = oracle(h[:SAMPLE], w, every[:SAMPLE], grad[:SAMPLE])
    keep = target[:SAMPLE] >= 0

    def error(result: Tensor | tuple[Tensor, ...]) -> float:
        if not isinstance(result, tuple):
            return float((result[:SAMPLE].double() - exact)[keep].abs().max())
        wrong = (result[0][:SAMPLE].double() - exact_gradient)[keep]
        return float(wrong.abs().max() / exact_gradient.abs().max())

    found = contestants(shape, run)
    result = []
    for step in ("forward", "both"):

        def bound(name: str, step: str = step) -> Contestant:
            function = found[name][0]
            if isinstance(function, str):
                return function
            ids = every if name == BASELINE or name == peers.COMPILED else target
            if step == "both":
                return lambda: torch.autograd.grad(function(h, w, ids), (h, w), grad)

            def forward() -> Tensor:
                with torch.no_grad():
                    return function(h, w, ids)

            return forward

        figures = contest(
            run,
            OP,
            {name: bound(name) for name in found},
            floors=timing.products(h.detach(), w.detach()),
            baseline=BASELINE,
            error=error,
        )
        one_product = 2e-12 * shape.rows * shape.hidden * shape.vocab
        work, counted = dict.fromkeys(figures, one_product), dict.fromkeys(figures, 1)
        for name, (_, count) in found.items():
            rows = 1.0 if name in (BASELINE, peers.COMPILED) else shape.valid
            counted[name] = 1 if step == "forward" else count
            work[name] = one_product * rows * counted[name]
        columns = {"shape": shape.label, "N": shape.rows, "H": shape.hidden, "V": shape.vocab}
        columns |= {"valid": shape.valid, "pass": step}
        floors = [name for name in figures if name not in found]
        table = lines(figures, shape=columns, unit="TFLOP/s", work=work, floors=floors, ceiling=run.gemm)
        for line in table:
            extra, base = line["extra_MiB"], figures[BASELINE].extra_MiB
            line["memory"] = extra / base if base and extra is not None else None
            line["products"] = counted[line["kernel"]]
        result += table
    return result


# ------------------------------------------------------------------------------------------------ goals
def goals(table: list[dict[str, Any]]) -> list[Goal]:
    """Against the baseline on a CPU; against the roofline and the peers on an H200."""
    found = []
    for hidden, limit in ((1024, 1.4), (2048, 1.25)):
        forward: dict[str, Any] = {"shape": f"H {hidden}", "valid": 1.0, "pass": "forward", "kernel": SPEED}
        found.append(Goal("cpu", f"forward, H {hidden}, times as fast", "≥", limit, one(table, "ratio", **forward)))
        found.append(
            Goal("cpu", f"forward, H {hidden}, share of the memory", "≤", 0.05, one(table, "memory", **forward))
        )
    half: dict[str, Any] = {"valid": 0.5, "pass": "both", "kernel": SPEED}
    for hidden in (1024, 2048):
        value = one(table, "ratio", shape=f"H {hidden}", **half)
        found.append(Goal("cpu", f"both, H {hidden}, half ignored, times as fast", "≥", 2.0, value))
    for model, limit in (("8B", 0.85), ("405B", 0.92)):
        for kernel, memory in ((SPEED, {1: 4.5, 8: 0.6}), (MEMORY, {1: 1.0, 8: 0.3})):
            for tp, gib in memory.items():
                mine = select(table, shape=f"{model} tp {tp}", kernel=kernel, **{"pass": "both"})
                work = "6NHV" if kernel == SPEED else "8NHV"
                what = f"{model} tp {tp}, {kernel.removeprefix('ours ')}"
                share = worst(line["roofline"] for line in mine)
                found.append(Goal("H200", f"{what}, share of the {work} roofline", "≥", limit, share))
                extra = worst((line["extra_MiB"] for line in mine), max)
                found.append(Goal("H200", f"{what}, extra GiB", "≤", gib, None if extra is None else extra / 1024))
                if kernel == SPEED:
                    ahead = worst(_ahead(table, line) for line in mine)
                    found.append(Goal("H200", f"{what}, times as fast as the best peer", "≥", 1.0, ahead))
    return found


def _ahead(table: list[dict[str, Any]], mine: Line) -> float | None:
    """How much faster a line is than the fastest peer measured on its shape and pass; None if there is none."""
    same: Mapping[str, Any] = {name: mine[name] for name in ("shape", "valid", "pass")}
    theirs = [
        line["ms"]
        for line in select(table, **same)
        if not line["kernel"].startswith((OURS, "GEMM")) and line["ms"] is not None
    ]
    return min(theirs) / mine["ms"] if theirs and mine["ms"] else None


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and, as the last line, one JSON object."""
    launch(OP, __doc__, arguments, TABLES, measure, goals)


if __name__ == "__main__":
    main()
