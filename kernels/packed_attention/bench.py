"""Benchmark of packed_attention: shared prefixes by both strategies against the expanded layout.

    python -m tulu_hpc.kernels.packed_attention.bench [--quick] [--json PATH]

`pair_ratio` is the arithmetic of the expanded layout over that of the shared one, the best a strategy can gain in the
attention itself (all other layers gain the ratio of rows). CPU seconds of the process on CPU, device time on CUDA.
"""

import argparse
import itertools
from typing import Any

import torch

from tulu_hpc.kernels.packed_attention.ops import packed_attention
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, plan_attention
from tulu_hpc.kernels.registry import last_backend
from tulu_hpc.kernels.timing import best_milliseconds, report

# groups, group size, prompt, response, heads, kv heads, head dim; group size 0: ordinary sequences of `response` rows
QUICK = [(8, 8, 32, 32, 4, 2, 32), (16, 2, 48, 48, 4, 2, 32), (32, 0, 0, 64, 4, 2, 32)]
FULL = [*QUICK, (2, 8, 256, 256, 8, 2, 64), (2, 2, 512, 256, 8, 2, 64), (4, 0, 0, 1024, 8, 2, 64)]
FULL_CUDA = [(1, 8, 1024, 1024, 32, 8, 128), (8, 2, 512, 512, 32, 8, 128), (1, 0, 0, 8192, 32, 8, 128)]


def layouts(groups: int, size: int, prompt: int, response: int) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """cu_seqlens and prefix of the shared layout, and cu_seqlens of the expanded one."""
    if size == 0:
        cu = [0, *itertools.accumulate([response] * groups)]
        return cu, [(0, 0)] * groups, cu
    cu = [0, *itertools.accumulate([prompt] * groups + [response] * (groups * size))]
    prefix = [(0, 0)] * groups + [(cu[g], cu[g + 1]) for g in range(groups) for _ in range(size)]
    return cu, prefix, [0, *itertools.accumulate([prompt + response] * (groups * size))]


def time_plan(plan: AttentionPlan, dtype: torch.dtype) -> float:
    """Forward and backward milliseconds."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(plan.num_queries, plan.heads), (plan.num_keys, plan.kv_heads), (plan.num_keys, plan.kv_heads)]
    inputs = [torch.randn(*s, plan.head_dim, generator=generator).to(plan.device, dtype) for s in shapes]
    q, k, v = (x.requires_grad_() for x in inputs)
    grad = torch.randn_like(q)
    run = lambda: torch.autograd.grad(packed_attention(q, k, v, plan), (q, k, v), grad)  # noqa: E731
    return best_milliseconds(run, plan.device.type)


def measure(shape: tuple[int, int, int, int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One line of the table."""
    groups, size, prompt, response, heads, kv_heads, head_dim = shape
    cu, prefix, expanded_cu = layouts(groups, size, prompt, response)
    common: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "device": device}
    expanded = plan_attention(expanded_cu, **common)
    chosen = plan_attention(cu, prefix, **common)
    line: dict[str, Any] = {"groups": groups, "G": size, "P": prompt, "R": response, "heads": f"{heads}/{kv_heads}"}
    line["rows"], line["expanded_rows"] = cu[-1], expanded_cu[-1]
    line["pair_ratio"] = expanded.attention_pairs / chosen.attention_pairs
    line["expanded_ms"] = time_plan(expanded, dtype)
    for strategy in ("repeat", "merge"):
        plan = plan_attention(cu, prefix, strategy=strategy, **common)
        line[f"{strategy}_ms"] = time_plan(plan, dtype)
        line[f"{strategy}_ratio"] = line["expanded_ms"] / line[f"{strategy}_ms"]
    line["chosen"] = chosen.strategy
    line["backend"] = last_backend("packed_attention")
    return line


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    shapes = QUICK if options.quick else FULL_CUDA if cuda else FULL
    dtype = torch.bfloat16 if cuda else torch.float32
    report("packed_attention", [measure(shape, "cuda" if cuda else "cpu", dtype) for shape in shapes], options.json)


if __name__ == "__main__":
    main()
