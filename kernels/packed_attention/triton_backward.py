"""Flash attention in Triton over the tables of `triton_plan`: the backward kernels.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim (padded to a power of two).

Flash attention's [2205.14135, 2307.08691]: gradients of queries by query tiles, of keys and values by key tiles.
Nothing is added atomically: a program owns what it writes, and parts of split key tiles are added in a fixed order.
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from tulu_hpc.kernels.packed_attention.triton_tile import LN_2, LOG2_E, key_rows_of, load, store, walk
from tulu_hpc.kernels.triton_dot import dot


@triton.jit
def _query_gradient_step(
    q, grad, accumulator, lse, delta, k_base, v_base, table, keys, stop, bound, stride, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PERMUTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    real = keys < stop
    rows = key_rows_of(table, keys, real, PERMUTED, MASKED)
    k = load(k_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
    v = load(v_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
    zero = tl.zeros((q.shape[0], keys.shape[0]), tl.float32)
    scores = dot(q, tl.trans(k), zero) * scale
    if MASKED:
        scores = tl.where(keys[None, :] < bound[:, None], scores, float("-inf"))
    p = tl.exp2(scores - lse[:, None])
    ds = p * (dot(grad, tl.trans(v), zero) - delta[:, None])
    return dot(ds.to(k.dtype), k, accumulator)


@triton.jit
def query_gradient_kernel(
    grad, q, k, v, out, lse, dq, levels, deltas, tables, key_rows, queries, heads, kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PERMUTED: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, N). Also writes [N, T] levels (log-sum-exp in base 2) and deltas (sum of grad x out)."""
    head = tl.program_id(1)
    query_start, query_stop, shift, prefix_start, prefix_stop, key_start, prefix_full, own_full, left, masked = walk(
        tables + tl.program_id(0) * 6, BLOCK_N
    )
    rows = query_start + tl.arange(0, BLOCK_M)
    real = rows < query_stop
    columns = tl.arange(0, BLOCK_N)
    stride, kv_stride = heads * HEAD_DIM, kv_heads * HEAD_DIM
    k_base, v_base = k + head // GROUP * HEAD_DIM, v + head // GROUP * HEAD_DIM
    grad_tile = load(grad + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
    out_tile = load(out + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    # Rows that do not exist have an infinite log-sum-exp, hence probability 0.
    level = tl.load(lse + rows.to(tl.int64) * heads + head, mask=real, other=float("inf")) * LOG2_E
    place = head.to(tl.int64) * queries + rows
    tl.store(levels + place, level, mask=real)
    tl.store(deltas + place, delta, mask=real)
    q_tile = load(q + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(0, prefix_full + own_full):
        start = tl.where(i < prefix_full, prefix_start + i * BLOCK_N, key_start + (i - prefix_full) * BLOCK_N)
        accumulator = _query_gradient_step(
            q_tile, grad_tile, accumulator, level, delta, k_base, v_base, key_rows, start + columns, 0, rows, kv_stride,
            scale, HEAD_DIM, BLOCK_D, PERMUTED, False,
        )  # fmt: skip
    for i in range(0, masked):
        in_prefix = i < left
        start = tl.where(in_prefix, prefix_start + prefix_full * BLOCK_N, key_start + (own_full + i - left) * BLOCK_N)
        stop = tl.where(in_prefix, prefix_stop, query_stop + shift)
        bound = tl.where(in_prefix, prefix_stop, rows + shift + 1)
        accumulator = _query_gradient_step(
            q_tile, grad_tile, accumulator, level, delta, k_base, v_base, key_rows, start + columns, stop, bound,
            kv_stride, scale, HEAD_DIM, BLOCK_D, PERMUTED, True,
        )  # fmt: skip
    store(dq + head * HEAD_DIM, rows, real, stride, accumulator * (scale * LN_2), HEAD_DIM, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    grad, q, k, v, levels, deltas, dk, dv, partial, parts, visits, key_rows, queries, heads, kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PERMUTED: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """Grid (key parts, Nk): all query heads of the group, all visits, in order. A visit's shift makes the mask.

    OF_KEYS, OF_VALUES: which gradients to compute; two launches where the registers do not hold both.

    partial: fp32 [slots, 2, Nk, BLOCK_N, BLOCK_D], dk and dv, for the parts of split tiles.
    """
    part = parts + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    key_start, key_stop = tl.load(part), tl.load(part + 1)
    low, high, slot = tl.load(part + 2), tl.load(part + 3), tl.load(part + 4)
    keys = key_start + tl.arange(0, BLOCK_N)
    real = keys < key_stop
    rows = key_rows_of(key_rows, keys, real, PERMUTED, True)
    stride, kv_stride = heads * HEAD_DIM, kv_heads * HEAD_DIM
    k_tile = load(k + key_head * HEAD_DIM, rows, real, kv_stride, HEAD_DIM, BLOCK_D, True)
    v_tile = load(v + key_head * HEAD_DIM, rows, real, kv_stride, HEAD_DIM, BLOCK_D, True)
    if OF_KEYS:
        dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if OF_VALUES:
        dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first_head = key_head.to(tl.int64) * GROUP
    zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    count = high - low
    for i in range(0, GROUP * count):
        head = first_head + i // count
        visit = visits + (low + i % count) * 3
        query_start, query_stop, shift = tl.load(visit), tl.load(visit + 1), tl.load(visit + 2)
        # Without a second accumulator for the scores, which on sm_100 would cost registers.
        for start in tl.range(query_start, query_stop, BLOCK_M, disallow_acc_multi_buffer=True):
            of_q = start + tl.arange(0, BLOCK_M)
            exists = of_q < query_stop
            q_tile = load(q + head * HEAD_DIM, of_q, exists, stride, HEAD_DIM, BLOCK_D, True)
            # Rows that do not exist have an infinite log-sum-exp, hence probability 0.
            level = tl.load(levels + head * queries + of_q, mask=exists, other=float("inf"))
            scores = dot(k_tile, tl.trans(q_tile), zero) * scale
            scores = tl.where(keys[:, None] <= (of_q + shift)[None, :], scores, float("-inf"))
            p = tl.exp2(scores - level[None, :])
            grad_tile = load(grad + head * HEAD_DIM, of_q, exists, stride, HEAD_DIM, BLOCK_D, True)
            if OF_VALUES:
                dv_tile = dot(p.to(grad_tile.dtype), grad_tile, dv_tile)
            if OF_KEYS:
                delta = tl.load(deltas + head * queries + of_q, mask=exists, other=0.0)
                ds = p * (dot(v_tile, tl.trans(grad_tile), zero) - delta[None, :])
                dk_tile = dot(ds.to(q_tile.dtype), q_tile, dk_tile)
    size: tl.constexpr = BLOCK_N * BLOCK_D
    place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    base = partial + (key_head.to(tl.int64) + 2 * kv_heads * slot) * size + place
    if OF_KEYS:
        dk_tile *= scale * LN_2
        if slot < 0:
            store(dk + key_head * HEAD_DIM, rows, real, kv_stride, dk_tile, HEAD_DIM, BLOCK_D)
        else:
            tl.store(base, dk_tile)
    if OF_VALUES:
        if slot < 0:
            store(dv + key_head * HEAD_DIM, rows, real, kv_stride, dv_tile, HEAD_DIM, BLOCK_D)
        else:
            tl.store(base + kv_heads * size, dv_tile)


@triton.jit
def add_parts_kernel(
    partial, dk, dv, splits, key_rows, kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    PERMUTED: tl.constexpr,
):  # fmt: skip
    """Grid (split tiles, Nk, BLOCK_N / BLOCK_ROWS): adds the parts of a key tile in their order."""
    split = splits + tl.program_id(0) * 4
    key_head = tl.program_id(1)
    key_start, key_stop, low, high = tl.load(split), tl.load(split + 1), tl.load(split + 2), tl.load(split + 3)
    inside = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = key_start + inside < key_stop
    rows = key_rows_of(key_rows, key_start + inside, real, PERMUTED, True)
    size: tl.constexpr = BLOCK_N * BLOCK_D
    place = inside[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    dk_tile = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for slot in range(low, high):
        base = partial + (key_head.to(tl.int64) + 2 * kv_heads * slot) * size
        dk_tile += tl.load(base + place)
        dv_tile += tl.load(base + kv_heads * size + place)
    store(dk + key_head * HEAD_DIM, rows, real, kv_heads * HEAD_DIM, dk_tile, HEAD_DIM, BLOCK_D)
    store(dv + key_head * HEAD_DIM, rows, real, kv_heads * HEAD_DIM, dv_tile, HEAD_DIM, BLOCK_D)
