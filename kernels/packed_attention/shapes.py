"""The shapes of packed_attention's benchmark, and their two layouts."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import torch

from tulu_hpc.kernels.packed_attention.contestants import Pack
from tulu_hpc.kernels.timing import Run, Tables


class Shape(NamedTuple):
    """G responses of R rows on each of `groups` prompts of P rows; G = 0: `groups` ordinary sequences of R rows."""

    label: str
    groups: int
    G: int
    P: int
    R: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int = 0  # of the layer around it, 0: none is measured
    ffn: int = 0

    def columns(self) -> dict[str, Any]:
        heads = f"{self.heads}/{self.kv_heads}x{self.head_dim}"
        return {"shape": self.label, "groups": self.groups, "G": self.G, "P": self.P, "R": self.R, "heads": heads}


CPU_QUICK = [
    Shape("GRPO G 8", 8, 8, 32, 32, 4, 2, 32, 128, 448),
    Shape("DPO P=R", 16, 2, 48, 48, 4, 2, 32, 128, 448),
    Shape("causal", 16, 0, 0, 64, 4, 2, 32),
]
CPU = [
    Shape("GRPO G 8", 1, 8, 256, 256, 8, 2, 64, 512, 1792),
    Shape("GRPO G 16", 1, 16, 128, 128, 8, 2, 64, 512, 1792),
    Shape("DPO P=R", 2, 2, 256, 256, 8, 2, 64, 512, 1792),
    Shape("DPO P=2R", 2, 2, 512, 256, 8, 2, 64, 512, 1792),
    Shape("causal", 2, 0, 0, 1024, 8, 2, 64),
]
# Llama 3.1: heads, kv heads, hidden, ffn. A tensor-parallel shard has an 8th of the heads and of the ffn, hidden whole.
MODELS = {"8B": (32, 8, 4096, 14336), "70B": (64, 8, 8192, 28672), "405B": (128, 8, 16384, 53248)}
LAYOUTS = {
    "GRPO G 8": (1, 8, 1024, 1024),
    "GRPO G 16": (1, 16, 512, 512),
    "DPO P=R": (8, 2, 512, 512),
    "DPO P=2R": (6, 2, 1024, 512),
}
CUDA = [
    Shape("causal 8k, D 128", 1, 0, 0, 8192, 32, 8, 128),
    Shape("causal 8k, D 64", 1, 0, 0, 8192, 32, 8, 64),
    Shape("causal 8k, D 256", 1, 0, 0, 8192, 16, 4, 256),
    *(
        Shape(f"{model} tp {tp} {name}", *layout, heads // tp, kv_heads // tp, 128, hidden, ffn // tp)
        for model, (heads, kv_heads, hidden, ffn) in MODELS.items()
        for tp in (1, 8)
        for name, layout in LAYOUTS.items()
    ),
]
CUDA_QUICK = [shape for shape in CUDA if shape.label == "causal 8k, D 128" or shape.label.startswith("8B tp 1")]


def shrink(shape: Shape) -> Shape:
    """As many segments (but for G, of which a quarter is left), short, with few and narrow heads."""
    kv_heads = max(1, shape.kv_heads // 8)
    heads = kv_heads * min(4, shape.heads // shape.kv_heads)
    length = 400 if shape.G == 0 else 64
    return shape._replace(
        groups=min(shape.groups, 2), G=max(2, shape.G // 4) if shape.G else 0, P=shape.P // length,
        R=shape.R // length, heads=heads, kv_heads=kv_heads, head_dim=max(16, shape.head_dim // 8),
        hidden=shape.hidden // 128, ffn=shape.ffn // 128,
    )  # fmt: skip


TABLES = Tables(CPU, CPU_QUICK, CUDA, CUDA_QUICK, shrink)


def packs(shape: Shape, run: Run) -> dict[str, Pack]:
    """The layouts of a shape: expanded (every response with its own prompt) and shared, the latter where it differs."""
    new = partial(
        Pack,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        device=torch.device(run.device),
        dtype=run.dtype,
    )
    if shape.G == 0:
        cu = [0, *itertools.accumulate([shape.R] * shape.groups)]
        return {"expanded": new(cu, [(0, 0)] * shape.groups)}
    cu = [0, *itertools.accumulate([shape.P] * shape.groups + [shape.R] * (shape.groups * shape.G))]
    prefix = [(0, 0)] * shape.groups
    prefix += [(cu[g], cu[g + 1]) for g in range(shape.groups) for _ in range(shape.G)]
    expanded = [0, *itertools.accumulate([shape.P + shape.R] * (shape.groups * shape.G))]
    return {"expanded": new(expanded, [(0, 0)] * (len(expanded) - 1)), "shared": new(cu, prefix)}
