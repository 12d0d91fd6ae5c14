"""Benchmark of rope: forward and backward, beside eager and compiled torch, Liger, and a copy of the same bytes.

    python -m tulu_hpc.kernels.rope.bench [--quick | --rehearse] [--json PATH] [--markdown PATH]

Columns:
    shape      rows, heads/kv heads x head dim
    pass       forward; both: and the gradients of q and k
    ms         best turn: CPU time of the process on CPU, device time on CUDA
    GB/s       bytes that must move: q and k in and out, the tables in; both: twice that
    roofline   GB/s over those of a copy of as many bytes in the same run (line `copy`)
    ratio      median over the turns of eager torch's time over this one's
    extra_MiB  peak memory beyond inputs and results
    error      largest of q against float64, over the largest value; both: of the gradient of q
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels import triton_support
from tulu_hpc.kernels.bench_losses import COPY, EAGER
from tulu_hpc.kernels.bench_report import launch
from tulu_hpc.kernels.contest import Contestant, contest, lines, ours
from tulu_hpc.kernels.rope.ops import OP, rope, rope_tables
from tulu_hpc.kernels.timing import Run, Tables, copying

Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Shape(NamedTuple):
    """Packed q and k."""

    label: str
    rows: int
    heads: int
    kv_heads: int
    head_dim: int


QUICK = [Shape("small", 256, 4, 2, 32)]
FULL = [Shape("2k", 2048, 8, 2, 64), Shape("4k", 4096, 32, 8, 64)]
CUDA = [
    Shape(f"{model} tp {tp}", rows, heads // tp, 8 // tp, 128)
    for model, heads, rows in (("8B", 32, 16384), ("70B", 64, 16384), ("405B", 128, 16384))
    for tp in (1, 8)
]
CUDA_QUICK = CUDA[:1]


def shrink(shape: Shape) -> Shape:
    """32 rows, a quarter of the heads and of the head dim."""
    return shape._replace(
        rows=32, heads=shape.heads // 4, kv_heads=max(1, shape.kv_heads // 4), head_dim=shape.head_dim // 4
    )


TABLES = Tables(FULL, QUICK, CUDA, CUDA_QUICK, shrink)


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Hugging Face's Llama writes it, tables [T, D]."""

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return (x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]).to(x.dtype)

    return turned(q), turned(k)


def _liger(cos: Tensor, sin: Tensor, run: Run) -> Turn | str:
    """Liger's Triton kernel, which takes [1, heads, T, D]."""
    if not importlib.util.find_spec("liger_kernel"):
        return "liger_kernel is not installed (extra `peers`)"
    if run.device != "cuda" and not triton_support.interpreting():
        return "a Triton kernel: needs CUDA"

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import LigerRopeFunction

        # It turns its arguments in place.
        out = LigerRopeFunction.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
        q, k = (x[0].transpose(0, 1) for x in out)
        return q, k

    return call


def measure(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """Lines of both passes."""
    generator = torch.Generator(run.device).manual_seed(0)
    new = partial(torch.randn, generator=generator, device=run.device, dtype=run.dtype)
    q, k, grad_q, grad_k = (
        new(shape.rows, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.heads, shape.kv_heads)
    )
    ids = torch.arange(shape.rows, device=run.device) % 4096
    exponents = torch.arange(0, shape.head_dim, 2, device=run.device) / shape.head_dim
    tables = rope_tables(ids, 500000.0**-exponents)
    cos, sin = (torch.cat((x, x), -1) for x in tables)
    exact, _ = eager(q.double(), k.double(), cos.double(), sin.double())
    # The gradient turns back.
    exact_gradient, _ = eager(grad_q.double(), grad_k.double(), cos.double(), -sin.double())
    turns: dict[str, Turn | str] = {
        EAGER: partial(eager, cos=cos, sin=sin),
        "torch compiled": partial(torch.compile(eager, dynamic=False), cos=cos, sin=sin),
        "liger": _liger(cos, sin, run),
    }
    turns |= ours(OP, run, partial(rope, position_ids_T=None, frequencies=tables))
    result = []
    for step, wanted in (("forward", exact), ("both", exact_gradient)):

        def error(found: tuple[Tensor, Tensor], wanted: Tensor = wanted) -> float:
            return float((found[0].double() - wanted).abs().max() / wanted.abs().max())

        def bound(turn: Turn | str, step: str = step) -> Contestant:
            if isinstance(turn, str):
                return turn
            # Tensors of its own, because Liger writes into its arguments.
            grads = (grad_q.clone(), grad_k.clone())
            if step == "forward":
                return partial(turn, q.clone(), k.clone())
            leaves = (q.clone().requires_grad_(), k.clone().requires_grad_())
            return lambda: torch.autograd.grad(turn(*leaves), leaves, grads)

        moved = (1 if step == "forward" else 2) * (2 * (q.nbytes + k.nbytes) + sum(x.nbytes for x in tables))
        floors = {COPY: copying(moved, run.device)}
        contestants = {name: bound(turn) for name, turn in turns.items()}
        figures = contest(run, OP, contestants, floors=floors, baseline=EAGER, error=error)
        heads = f"{shape.heads}/{shape.kv_heads}x{shape.head_dim}"
        columns = {"shape": shape.label, "rows": shape.rows, "heads": heads, "pass": step}
        result += lines(figures, shape=columns, unit="GB/s", work=1e-9 * moved, floors=floors)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and, as the last line, one JSON object."""
    launch(OP, __doc__, arguments, TABLES, measure)


if __name__ == "__main__":
    main()
