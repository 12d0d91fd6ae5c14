"""Packs, tensors and the float64 oracle that the tests of packed_attention's Triton kernels share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.fuzz import close
from tulu_hpc.kernels import last_backend, packed_attention, plan_attention
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan
from tulu_hpc.kernels.packed_attention.reference import attention_dense
from tulu_hpc.kernels.packed_attention.triton_plan import Tile, Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = "packed_attention"
# Prompts of 20 and 7 rows, an ordinary segment, one of no rows, one of one row, then responses.
CU = [0, 20, 27, 46, 46, 47, 64, 68, 69, 88]
PREFIX = [(0, 0)] * 5 + [(0, 20), (0, 20), (20, 27), (20, 27)]
SMALL = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))


def make_plan(cu: Any, prefix: Any = None, heads: int = 2, kv_heads: int = 1, head_dim: int = 16, **options: Any):
    return plan_attention(cu, prefix, heads=heads, kv_heads=kv_heads, head_dim=head_dim, device=DEVICE, **options)


def tensors(plan: AttentionPlan, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (plan.num_queries, plan.heads, plan.head_dim), (plan.num_keys, plan.kv_heads, plan.head_dim)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for s in (queries, keys, keys, queries)
    ]


def gradients(plan: AttentionPlan, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    q, k, v, grad = inputs
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = packed_attention(q, k, v, plan, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def run(plan: AttentionPlan, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    found = gradients(plan, inputs, backend="triton", **options)
    assert last_backend(OP) == "triton"
    return found


def oracle(plan: AttentionPlan, inputs: list[Tensor], scale: float | None = None) -> list[Tensor]:
    """In float64, on the values that the tensors hold."""
    q, k, v, grad = (x.double() for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention_dense(q, k, v, plan, plan.head_dim**-0.5 if scale is None else scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def compare(plan: AttentionPlan, dtype: torch.dtype, tolerance: float, seed: int = 0, **options: Any) -> None:
    inputs = tensors(plan, dtype, seed)
    for name, mine, want in zip(
        ["out", "dq", "dk", "dv"], run(plan, inputs, **options), oracle(plan, inputs, **options)
    ):
        assert mine.dtype == dtype
        close(mine.double(), want, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
