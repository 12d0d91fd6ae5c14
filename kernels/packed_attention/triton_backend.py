"""Triton backend: one flash attention launch over all segments and their prefixes, deterministic backward.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import AttentionPlan
from tulu_hpc.kernels.packed_attention.triton_plan import Tile, tables, tiles

MOST_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend does not take such tensors, None if it does."""
    if dtype in _DTYPES and head_dim <= MOST_HEAD_DIM:
        return None
    return f"takes bfloat16, float16 or float32 with a head dim up to {MOST_HEAD_DIM}, got {dtype} with {head_dim}"


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _options(plan: AttentionPlan, tile: Tile) -> dict[str, int | bool]:
    return {
        "GROUP": plan.heads // plan.kv_heads,
        "HEAD_DIM": plan.head_dim,
        "BLOCK_D": _padded(plan.head_dim),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "PERMUTED": plan.key_order is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and log-sum-exp [T, N] in fp32; the tensors are contiguous."""
    from tulu_hpc.kernels.packed_attention import triton_forward

    sizes = tiles(plan.head_dim, q.dtype, plan.key_order is not None)
    table = tables(plan, sizes)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    grid = (table.forward.shape[0], plan.heads)
    if table.forward.shape[0]:
        triton_forward.forward_kernel[grid](
            *(q, k, v, out, lse, table.forward, _key_rows(table.key_rows, table.forward)),
            *(plan.heads, plan.kv_heads, scale * _LOG2_E),
            **_options(plan, sizes.forward),
        )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the same bits in every run; any output and log-sum-exp may be given."""
    from tulu_hpc.kernels.packed_attention import triton_backward

    sizes = tiles(plan.head_dim, q.dtype, plan.key_order is not None)
    table = tables(plan, sizes)
    key_rows = _key_rows(table.key_rows, table.parts)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    levels, deltas = (q.new_empty((plan.heads, plan.num_queries), dtype=torch.float32) for _ in range(2))
    numbers = (plan.num_queries, plan.heads, plan.kv_heads, scale * _LOG2_E)
    if table.query_gradient.shape[0]:
        triton_backward.query_gradient_kernel[(table.query_gradient.shape[0], plan.heads)](
            *(grad, q, k, v, out, lse, dq, levels, deltas, table.query_gradient, key_rows),
            *numbers,
            **_options(plan, sizes.query_gradient),
        )
    options = _options(plan, sizes.key_gradient)
    shape = (max(table.slots, 1), 2, plan.kv_heads, options["BLOCK_N"], options["BLOCK_D"])
    partial = q.new_empty(shape if table.slots else 1, dtype=torch.float32)
    for which in sizes.key_passes if table.parts.shape[0] else []:
        triton_backward.key_gradient_kernel[(table.parts.shape[0], plan.kv_heads)](
            *(grad, q, k, v, levels, deltas, dk, dv, partial, table.parts, table.visits, key_rows),
            *numbers,
            **options,
            **which,
        )
    if table.slots:
        block_rows = min(16, sizes.key_gradient.keys)
        triton_backward.add_parts_kernel[(table.splits.shape[0], plan.kv_heads, sizes.key_gradient.keys // block_rows)](
            *(partial, dk, dv, table.splits, key_rows, plan.kv_heads),
            **{name: options[name] for name in ("HEAD_DIM", "BLOCK_D", "BLOCK_N", "PERMUTED")},
            BLOCK_ROWS=block_rows,
        )
    return dq, dk, dv


def _key_rows(key_rows: Tensor | None, any_table: Tensor) -> Tensor:
    """A kernel argument is never None; without a permutation it is not read."""
    return any_table if key_rows is None else key_rows
