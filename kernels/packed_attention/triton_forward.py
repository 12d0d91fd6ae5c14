"""Flash attention in Triton over the tables of `triton_plan`: the forward kernel.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim (padded to a power of two).

The algorithm is flash attention's [2205.14135, 2307.08691] with one change: a query tile walks two key ranges, the
shared prefix and its own segment. Scores are kept in base 2 (times log2 e); the log-sum-exp in memory is natural.
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from tulu_hpc.kernels.packed_attention.triton_tile import LN_2, key_rows_of, load, store, walk
from tulu_hpc.kernels.triton_dot import dot


@triton.jit
def _forward_step(
    q, accumulator, total, highest, k_base, v_base, table, keys, stop, bound, stride, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PERMUTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax; a query sees the keys before its `bound`."""
    real = keys < stop
    rows = key_rows_of(table, keys, real, PERMUTED, MASKED)
    k = load(k_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], keys.shape[0]), tl.float32)) * scale
    if MASKED:
        scores = tl.where(keys[None, :] < bound[:, None], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    p = tl.exp2(scores - new_highest[:, None])
    correction = tl.exp2(highest - new_highest)
    total = total * correction + tl.sum(p, 1)
    v = load(v_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
    accumulator = dot(p.to(v.dtype), v, accumulator * correction[:, None])
    return accumulator, total, new_highest


@triton.jit
def forward_kernel(
    q, k, v, out, lse, tables, key_rows, heads, kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PERMUTED: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, N). scale: of the scores, times log2 e."""
    head = tl.program_id(1)
    query_start, query_stop, shift, prefix_start, prefix_stop, key_start, prefix_full, own_full, left, masked = walk(
        tables + tl.program_id(0) * 6, BLOCK_N
    )
    rows = query_start + tl.arange(0, BLOCK_M)
    real = rows < query_stop
    columns = tl.arange(0, BLOCK_N)
    stride, kv_stride = heads * HEAD_DIM, kv_heads * HEAD_DIM
    k_base, v_base = k + head // GROUP * HEAD_DIM, v + head // GROUP * HEAD_DIM
    q_tile = load(q + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(0, prefix_full + own_full):
        start = tl.where(i < prefix_full, prefix_start + i * BLOCK_N, key_start + (i - prefix_full) * BLOCK_N)
        accumulator, total, highest = _forward_step(
            q_tile, accumulator, total, highest, k_base, v_base, key_rows, start + columns, 0, rows, kv_stride, scale,
            HEAD_DIM, BLOCK_D, PERMUTED, False,
        )  # fmt: skip
    for i in range(0, masked):
        in_prefix = i < left
        start = tl.where(in_prefix, prefix_start + prefix_full * BLOCK_N, key_start + (own_full + i - left) * BLOCK_N)
        stop = tl.where(in_prefix, prefix_stop, query_stop + shift)
        bound = tl.where(in_prefix, prefix_stop, rows + shift + 1)
        accumulator, total, highest = _forward_step(
            q_tile, accumulator, total, highest, k_base, v_base, key_rows, start + columns, stop, bound, kv_stride,
            scale, HEAD_DIM, BLOCK_D, PERMUTED, True,
        )  # fmt: skip
    store(out + head * HEAD_DIM, rows, real, stride, accumulator / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse + rows.to(tl.int64) * heads + head, (highest + tl.log2(total)) * LN_2, mask=real)
