"""Benchmark of packed_attention: shared prefixes beside the expanded layout and beside other libraries; a whole layer.

    python -m tulu_hpc.kernels.packed_attention.bench [--quick] [--part attention|layer] [--json PATH]
    TRITON_INTERPRET=1 python -m tulu_hpc.kernels.packed_attention.bench --quick       # Triton too, without a GPU

Lines of part `attention`: one contestant on one layout, forward and forward + backward. Lines of part `layer`: a Llama
layer (norms, projections, RoPE, attention, MLP) around packed_attention. Milliseconds are CPU time of the process on
CPU, device time on CUDA.

    pairs       (query, key) pairs of the layout; 4 pairs N D FLOPs forward, 2.5 times that backward
    of_ceiling  TFLOP/s over those of the fastest square matmul measured in the same run
    gain        milliseconds of the expanded layout (attention: of its fastest contestant) over those of the line
    of_possible gain over the best possible: the ratio of pairs (attention) or of rows (layer)
    extra_MiB   peak memory of forward + backward beyond inputs and gradients (CUDA)
    error       largest absolute difference of the output from float64 on a small pack with the same heads
    note        why a contestant has no figures here
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.packed_attention import contestants
from tulu_hpc.kernels.packed_attention.contestants import Pack, Unavailable
from tulu_hpc.kernels.packed_attention.ops import packed_attention
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan
from tulu_hpc.kernels.registry import last_backend
from tulu_hpc.kernels.rope.ops import rope, rope_tables
from tulu_hpc.kernels.timing import best_milliseconds, report


class Shape(NamedTuple):
    """G responses of R rows on each of `groups` prompts of P rows; G = 0: `groups` ordinary sequences of R rows."""

    groups: int
    G: int
    P: int
    R: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int = 0  # of the layer around it, 0: none is measured
    ffn: int = 0


INTERPRETED = [Shape(1, 2, 20, 20, 2, 1, 16, 32, 64), Shape(2, 0, 0, 20, 2, 1, 16)]
QUICK = [
    Shape(8, 8, 32, 32, 4, 2, 32, 128, 448),
    Shape(16, 2, 48, 48, 4, 2, 32, 128, 448),
    Shape(32, 0, 0, 64, 4, 2, 32),
]
FULL = [
    *QUICK,
    Shape(1, 8, 256, 256, 8, 2, 64, 512, 1792),  # GRPO
    Shape(1, 16, 128, 128, 8, 2, 64, 512, 1792),
    Shape(2, 2, 256, 256, 8, 2, 64, 512, 1792),  # DPO, P = R and P = 2R
    Shape(2, 2, 512, 256, 8, 2, 64, 512, 1792),
    Shape(2, 0, 0, 1024, 8, 2, 64),
]
FULL_CUDA = [
    Shape(1, 0, 0, 8192, 32, 8, 128),
    Shape(1, 8, 1024, 1024, 32, 8, 128, 4096, 14336),  # 8B
    Shape(1, 16, 512, 1024, 32, 8, 128, 4096, 14336),
    Shape(8, 2, 512, 512, 32, 8, 128, 4096, 14336),
    Shape(6, 2, 1024, 512, 32, 8, 128, 4096, 14336),
    Shape(1, 8, 1024, 1024, 8, 1, 128, 8192, 3584),  # 70B, the tp 8 shard (hidden whole)
    Shape(8, 2, 512, 512, 16, 1, 128, 16384, 6656),  # 405B, the tp 8 shard
    Shape(1, 8, 1024, 1024, 16, 4, 256),
]


def packs(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Pack]:
    """The layouts of a shape: shared and expanded, or for ordinary sequences only the latter."""
    new = partial(
        Pack,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        device=torch.device(device),
        dtype=dtype,
    )
    if shape.G == 0:
        cu = [0, *itertools.accumulate([shape.R] * shape.groups)]
        return {"expanded": new(cu, [(0, 0)] * shape.groups)}
    cu = [0, *itertools.accumulate([shape.P] * shape.groups + [shape.R] * (shape.groups * shape.G))]
    prefix = [(0, 0)] * shape.groups
    prefix += [(cu[g], cu[g + 1]) for g in range(shape.groups) for _ in range(shape.G)]
    expanded = [0, *itertools.accumulate([shape.P + shape.R] * (shape.groups * shape.G))]
    return {"expanded": new(expanded, [(0, 0)] * (len(expanded) - 1)), "shared": new(cu, prefix)}


def matmul_tflops(device: str, dtype: torch.dtype, quick: bool) -> float:
    """The ceiling: the fastest square matmul."""
    best = 0.0
    for size in [256] if quick else [2048, 4096, 8192] if device == "cuda" else [512, 1024]:
        a = torch.randn(size, size).to(device, dtype)
        best = max(best, 2e-9 * size**3 / best_milliseconds(partial(torch.mm, a, a), device))
    return best


# ------------------------------------------------------------------------------------------------ attention alone
def measure_attention(shape: Shape, device: str, dtype: torch.dtype, ceiling: float) -> list[dict[str, Any]]:
    """Every contestant on every layout of a shape."""
    small = shape._replace(groups=1, P=min(shape.P, 24), R=min(shape.R, 24), G=min(shape.G, 2))
    probes = packs(small, device, dtype)
    lines: list[dict[str, Any]] = []
    for layout, pack in packs(shape, device, dtype).items():
        for name, make in contestants.of(layout, device).items():
            line = _line("attention", shape, layout, name, pack.rows) | {"pairs": pack.pairs}
            lines.append(line)
            try:
                with contestants.findings(name):
                    line["error"] = contestants.error(make, probes[layout])
                    line["forward_ms"], line["both_ms"], line["extra_MiB"] = _time(make, pack, device)
            except Unavailable as reason:
                line["note"] = str(reason)
                continue
            flops = 4e-9 * pack.pairs * shape.heads * shape.head_dim
            line["forward_tflops"] = flops / line["forward_ms"]
            line["backward_tflops"] = 2.5 * flops / max(line["both_ms"] - line["forward_ms"], 1e-9)
            line["forward_of_ceiling"] = line["forward_tflops"] / ceiling
            line["backward_of_ceiling"] = line["backward_tflops"] / ceiling
    expanded = [line for line in lines if line["layout"] == "expanded" and line["both_ms"]]
    fastest = min(line["both_ms"] for line in expanded)
    for line in lines:
        if line["both_ms"]:
            line["gain"] = fastest / line["both_ms"]
            line["of_possible"] = line["gain"] / (expanded[0]["pairs"] / line["pairs"])
    return lines


def _time(make: contestants.Maker, pack: Pack, device: str) -> tuple[float, float, float | None]:
    """Milliseconds forward, and forward + backward; on CUDA, the peak memory beyond inputs and gradients."""
    function, (q, k, v, grad) = make(pack), pack.tensors()
    with torch.no_grad():
        forward = best_milliseconds(lambda: function(q, k, v), device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    both = best_milliseconds(lambda: torch.autograd.grad(function(q, k, v), inputs, grad), device)
    if device != "cuda":
        return forward, both, None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(function(q, k, v), inputs, grad)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)
    return forward, both, extra / 2**20


def _line(part: str, shape: Shape, layout: str, contestant: str, rows: int) -> dict[str, Any]:
    heads = f"{shape.heads}/{shape.kv_heads}x{shape.head_dim}"
    line = {"part": part, "groups": shape.groups, "G": shape.G, "P": shape.P, "R": shape.R, "heads": heads}
    line |= {"layout": layout, "contestant": contestant, "rows": rows}
    empty = ("pairs", "forward_ms", "both_ms", "forward_tflops", "forward_of_ceiling", "backward_tflops")
    return line | dict.fromkeys((*empty, "backward_of_ceiling", "gain", "of_possible", "extra_MiB", "error", "note"))


# ------------------------------------------------------------------------------------------------ a whole layer
class Layer(nn.Module):
    """A Llama layer in plain torch around rope and packed_attention; one tensor-parallel rank's heads."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        hidden, columns = shape.hidden, shape.heads * shape.head_dim
        new = lambda a, b: nn.Linear(a, b, bias=False, device=device, dtype=dtype)  # noqa: E731
        self.norm, self.mlp_norm = (nn.RMSNorm(hidden, device=device, dtype=dtype) for _ in range(2))
        self.qkv = new(hidden, columns + 2 * shape.kv_heads * shape.head_dim)
        self.o = new(columns, hidden)
        self.up, self.down = new(hidden, 2 * shape.ffn), new(shape.ffn, hidden)

    def forward(self, x_TH: Tensor, plan: AttentionPlan, angles: tuple[Tensor, Tensor]) -> Tensor:
        s = self.shape
        qkv = self.qkv(self.norm(x_TH)).unflatten(1, (-1, s.head_dim))
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
        q, k = rope(q, k, None, angles)
        x_TH = x_TH + self.o(packed_attention(q, k, v, plan).flatten(1))
        gate, up = self.up(self.mlp_norm(x_TH)).chunk(2, -1)
        return x_TH + self.down(F.silu(gate) * up)


def measure_layer(shape: Shape, device: str, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Forward + backward of the layer in both layouts, in turns."""
    torch.manual_seed(0)
    layer = Layer(shape, device, dtype)
    runs: dict[str, Callable[[], Any]] = {}
    lines = []
    for layout, pack in packs(shape, device, dtype).items():
        plan = pack.plan()
        inverse = 500000.0 ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
        angles = rope_tables(pack.position_ids(), inverse)
        x = torch.randn(pack.rows, shape.hidden).to(device, dtype).requires_grad_()
        grad = torch.randn_like(x)

        inputs = [x, *layer.parameters()]
        runs[layout] = partial(_step, layer, x, plan, angles, inputs, grad)
        runs[layout]()
        name = f"{last_backend('packed_attention')} {plan.strategy}"
        lines.append(_line("layer", shape, layout, name, pack.rows) | {"pairs": pack.pairs})
    times: dict[str, list[float]] = {layout: [] for layout in runs}
    for _ in range(repeats):  # in turns, so that what disturbs the machine disturbs both
        for layout, run in runs.items():
            times[layout].append(_milliseconds(run, device))
    for line in lines:
        line["both_ms"] = min(times[line["layout"]])
        line["gain"] = lines[0]["both_ms"] / line["both_ms"]
        line["of_possible"] = line["gain"] / (lines[0]["rows"] / line["rows"])
    return lines


def _step(
    layer: Layer, x: Tensor, plan: AttentionPlan, angles: tuple[Tensor, Tensor], inputs: list[Tensor], grad: Tensor
) -> None:
    torch.autograd.grad(layer(x, plan, angles), inputs, grad)


def _milliseconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        return best_milliseconds(run, device, repeats=1)
    before = time.process_time()
    run()
    return 1e3 * (time.process_time() - before) / torch.get_num_threads()


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--part", choices=("attention", "layer"), help="default: both")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    interpreted = device == "cpu" and triton_support.interpreting()
    shapes = INTERPRETED if interpreted else QUICK if options.quick else FULL_CUDA if device == "cuda" else FULL
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lines: list[dict[str, Any]] = []
    if options.part != "layer":
        ceiling = matmul_tflops(device, dtype, options.quick or interpreted)
        print(f"matmul ceiling {ceiling:.3f} TFLOP/s")
        for shape in shapes:
            lines += measure_attention(shape, device, dtype, ceiling)
    if options.part != "attention":
        for shape in shapes:
            if shape.hidden:
                lines += measure_layer(shape, device, dtype, 3 if options.quick or interpreted else 10)
    report("packed_attention", lines, options.json)


if __name__ == "__main__":
    main()
