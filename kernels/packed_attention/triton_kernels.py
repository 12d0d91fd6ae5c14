"""Flash attention in Triton over the tables of `triton_plan`, and the small kernels beside the flash libraries.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim (padded to a power of two).

The algorithm is flash attention's [2205.14135, 2307.08691] with one change: a query tile walks two key ranges, the
shared prefix and its own segment. Scores are kept in base 2 (times log2 e); the log-sum-exp in memory is natural.
Nothing is added atomically: a program owns what it writes.
"""

import itertools
from typing import Any

import triton
import triton.language as tl

from tulu_hpc.kernels.ahead_of_time import Case
from tulu_hpc.kernels.packed_attention.triton_plan import tiles
from tulu_hpc.kernels.triton_dot import dot

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(base, rows, real, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] tile of one head; zeros where `real` is false (if MASKED) and beyond HEAD_DIM."""
    dims = tl.arange(0, BLOCK_D)
    place = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        if MASKED:
            return tl.load(place, mask=real[:, None], other=0.0)
        return tl.load(place)
    if MASKED:
        return tl.load(place, mask=real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(place, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(base, rows, real, stride, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    place = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = real[:, None] if HEAD_DIM == BLOCK_D else real[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _key_rows(table, keys, real, PERMUTED: tl.constexpr, MASKED: tl.constexpr):
    """Rows of k and v of these pack rows."""
    if PERMUTED:
        if MASKED:
            return tl.load(table + keys, mask=real, other=0)
        return tl.load(table + keys)
    return keys


@triton.jit
def _walk(blocks, BLOCK_N: tl.constexpr):
    """Where a query tile goes: (full tiles of the prefix, all full tiles, masked tiles) and the range ends.

    Full tiles come first, those of the prefix before those of the segment up to the tile's first query; then, masked,
    what is left of the prefix and the tiles on the diagonal.
    """
    query_start, query_stop = tl.load(blocks), tl.load(blocks + 1)
    prefix_start, prefix_stop = tl.load(blocks + 2), tl.load(blocks + 3)
    key_start, shift = tl.load(blocks + 4), tl.load(blocks + 5)
    prefix_full = (prefix_stop - prefix_start) // BLOCK_N
    own_full = (query_start + shift + 1 - key_start) // BLOCK_N
    prefix_rest = prefix_start + prefix_full * BLOCK_N
    own_rest = key_start + own_full * BLOCK_N
    left = (prefix_rest < prefix_stop).to(tl.int32)  # 1: the prefix ends within a tile
    masked = left + tl.cdiv(query_stop + shift - own_rest, BLOCK_N)
    return query_start, query_stop, shift, prefix_start, prefix_stop, key_start, prefix_full, own_full, left, masked


@triton.jit
def _forward_step(
    q, accumulator, total, highest, k_base, v_base, table, keys, stop, bound, stride, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PERMUTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax; a query sees the keys before its `bound`."""
    real = keys < stop
    rows = _key_rows(table, keys, real, PERMUTED, MASKED)
    k = _load(k_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], keys.shape[0]), tl.float32)) * scale
    if MASKED:
        scores = tl.where(keys[None, :] < bound[:, None], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    p = tl.exp2(scores - new_highest[:, None])
    correction = tl.exp2(highest - new_highest)
    total = total * correction + tl.sum(p, 1)
    v = _load(v_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
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
    query_start, query_stop, shift, prefix_start, prefix_stop, key_start, prefix_full, own_full, left, masked = _walk(
        tables + tl.program_id(0) * 6, BLOCK_N
    )
    rows = query_start + tl.arange(0, BLOCK_M)
    real = rows < query_stop
    columns = tl.arange(0, BLOCK_N)
    stride, kv_stride = heads * HEAD_DIM, kv_heads * HEAD_DIM
    k_base, v_base = k + head // GROUP * HEAD_DIM, v + head // GROUP * HEAD_DIM
    q_tile = _load(q + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
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
    _store(out + head * HEAD_DIM, rows, real, stride, accumulator / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse + rows.to(tl.int64) * heads + head, (highest + tl.log2(total)) * _LN_2, mask=real)


@triton.jit
def _query_gradient_step(
    q, grad, accumulator, lse, delta, k_base, v_base, table, keys, stop, bound, stride, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PERMUTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    real = keys < stop
    rows = _key_rows(table, keys, real, PERMUTED, MASKED)
    k = _load(k_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
    v = _load(v_base, rows, real, stride, HEAD_DIM, BLOCK_D, MASKED)
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
    query_start, query_stop, shift, prefix_start, prefix_stop, key_start, prefix_full, own_full, left, masked = _walk(
        tables + tl.program_id(0) * 6, BLOCK_N
    )
    rows = query_start + tl.arange(0, BLOCK_M)
    real = rows < query_stop
    columns = tl.arange(0, BLOCK_N)
    stride, kv_stride = heads * HEAD_DIM, kv_heads * HEAD_DIM
    k_base, v_base = k + head // GROUP * HEAD_DIM, v + head // GROUP * HEAD_DIM
    grad_tile = _load(grad + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
    out_tile = _load(out + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    # Rows that do not exist have an infinite log-sum-exp, hence probability 0.
    level = tl.load(lse + rows.to(tl.int64) * heads + head, mask=real, other=float("inf")) * _LOG2_E
    place = head.to(tl.int64) * queries + rows
    tl.store(levels + place, level, mask=real)
    tl.store(deltas + place, delta, mask=real)
    q_tile = _load(q + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True)
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
    _store(dq + head * HEAD_DIM, rows, real, stride, accumulator * (scale * _LN_2), HEAD_DIM, BLOCK_D)


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
    rows = _key_rows(key_rows, keys, real, PERMUTED, True)
    stride, kv_stride = heads * HEAD_DIM, kv_heads * HEAD_DIM
    k_tile = _load(k + key_head * HEAD_DIM, rows, real, kv_stride, HEAD_DIM, BLOCK_D, True)
    v_tile = _load(v + key_head * HEAD_DIM, rows, real, kv_stride, HEAD_DIM, BLOCK_D, True)
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
            q_tile = _load(q + head * HEAD_DIM, of_q, exists, stride, HEAD_DIM, BLOCK_D, True)
            # Rows that do not exist have an infinite log-sum-exp, hence probability 0.
            level = tl.load(levels + head * queries + of_q, mask=exists, other=float("inf"))
            scores = dot(k_tile, tl.trans(q_tile), zero) * scale
            scores = tl.where(keys[:, None] <= (of_q + shift)[None, :], scores, float("-inf"))
            p = tl.exp2(scores - level[None, :])
            grad_tile = _load(grad + head * HEAD_DIM, of_q, exists, stride, HEAD_DIM, BLOCK_D, True)
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
        dk_tile *= scale * _LN_2
        if slot < 0:
            _store(dk + key_head * HEAD_DIM, rows, real, kv_stride, dk_tile, HEAD_DIM, BLOCK_D)
        else:
            tl.store(base, dk_tile)
    if OF_VALUES:
        if slot < 0:
            _store(dv + key_head * HEAD_DIM, rows, real, kv_stride, dv_tile, HEAD_DIM, BLOCK_D)
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
    rows = _key_rows(key_rows, key_start + inside, real, PERMUTED, True)
    size: tl.constexpr = BLOCK_N * BLOCK_D
    place = inside[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    dk_tile = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for slot in range(low, high):
        base = partial + (key_head.to(tl.int64) + 2 * kv_heads * slot) * size
        dk_tile += tl.load(base + place)
        dv_tile += tl.load(base + kv_heads * size + place)
    _store(dk + key_head * HEAD_DIM, rows, real, kv_heads * HEAD_DIM, dk_tile, HEAD_DIM, BLOCK_D)
    _store(dv + key_head * HEAD_DIM, rows, real, kv_heads * HEAD_DIM, dv_tile, HEAD_DIM, BLOCK_D)


@triton.jit
def merge_kernel(
    out, lse, part_out, part_lse, queries, heads, part_row_stride, part_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, N): out, lse <- the softmax over the keys of both calls; lse may be -inf for no keys."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = rows < queries
    wide = rows.to(tl.int64)
    first = tl.load(lse + wide * heads + head, mask=real, other=0.0)
    second = tl.load(part_lse + wide * part_row_stride + head * part_head_stride, mask=real, other=0.0)
    highest = tl.maximum(first, second)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    first_weight, second_weight = tl.exp(first - safe), tl.exp(second - safe)
    total = first_weight + second_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + wide * heads + head, highest + tl.log(divisor), mask=real)
    stride = heads * HEAD_DIM
    one = _load(out + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    two = _load(part_out + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    merged = one * (first_weight / divisor)[:, None] + two * (second_weight / divisor)[:, None]
    _store(out + head * HEAD_DIM, rows, real, stride, merged, HEAD_DIM, BLOCK_D)


@triton.jit
def sum_copies_kernel(part, order, offsets, out, width, BLOCK: tl.constexpr):
    """Grid (rows of out, column tiles): row m is the fp32 sum of part[order[i]], offsets[m] <= i < offsets[m + 1]."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        copy = tl.load(order + i).to(tl.int64)
        total += tl.load(part + copy * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


def ahead_of_time() -> list[Case]:
    """bf16 at head dims 64, 128, 256 with 4 and 8 query heads to a key head; fp16, fp32; the small kernels."""
    import torch

    found = []
    for head_dim, permuted in itertools.product((64, 128, 256), (False, True)):
        found += _attention_cases(head_dim, permuted, torch.bfloat16)
    found += _attention_cases(128, False, torch.float16)
    found += _attention_cases(64, False, torch.float32)
    return found + _small_cases(tiles(128, torch.bfloat16, True).key_gradient.keys)


def _attention_cases(head_dim: int, permuted: bool, dtype: Any) -> list[Case]:
    """The three kernels; fp32 is multiplied without tensor cores."""
    kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]
    sizes = tiles(head_dim, dtype, permuted)
    group = 8 if permuted else 4  # the ratio is a loop bound, both in one go
    of = lambda *names: dict.fromkeys(names, f"*{kind}")  # noqa: E731
    numbers = {"heads": "i32", "kv_heads": "i32", "scale": "fp32"}
    kernels = {
        "forward": (
            forward_kernel,
            sizes.forward,
            {**of("q", "k", "v", "out"), "lse": "*fp32", "tables": "*i32", "key_rows": "*i32", **numbers},
        ),
        "query_gradient": (
            query_gradient_kernel,
            sizes.query_gradient,
            {**of("grad", "q", "k", "v", "out"), "lse": "*fp32", **of("dq"), "levels": "*fp32", "deltas": "*fp32"}
            | {"tables": "*i32", "key_rows": "*i32", "queries": "i32", **numbers},
        ),
        "key_gradient": (
            key_gradient_kernel,
            sizes.key_gradient,
            {**of("grad", "q", "k", "v"), "levels": "*fp32", "deltas": "*fp32", **of("dk", "dv")}
            | {"partial": "*fp32", "parts": "*i32", "visits": "*i32"}
            | {"key_rows": "*i32", "queries": "i32", **numbers},
        ),
    }
    ending = ("" if kind == "bf16" else f"_{kind}") + ("_permuted" if permuted else "")
    found = []
    for name, (kernel, tile, signature) in kernels.items():
        for what in sizes.key_passes if name == "key_gradient" else [{}]:
            one = "" if len(what) == 0 or all(what.values()) else "_dk" if what["OF_KEYS"] else "_dv"
            found.append(
                Case(
                    f"packed_attention/{name}{one}/d{head_dim}_g{group}{ending}",
                    kernel,
                    signature,
                    {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": tile.queries}
                    | {"BLOCK_N": tile.keys, "PERMUTED": permuted, **what},
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    aligned=[name for name, pointer in signature.items() if pointer.startswith("*")],
                    tensor_core=kind != "fp32",
                )
            )
    return found


def _small_cases(block_n: int) -> list[Case]:
    rest = {"HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_ROWS": 16}
    small = [
        (
            add_parts_kernel,
            {"partial": "*fp32", "dk": "*bf16", "dv": "*bf16", "splits": "*i32", "key_rows": "*i32", "kv_heads": "i32"},
            {**rest, "BLOCK_N": block_n, "PERMUTED": True},
        ),
        (
            merge_kernel,
            {"out": "*bf16", "lse": "*fp32", "part_out": "*bf16", "part_lse": "*fp32", "queries": "i32", "heads": "i32"}
            | {"part_row_stride": "i32", "part_head_stride": "i32"},
            rest,
        ),
        (
            sum_copies_kernel,
            {"part": "*bf16", "order": "*i64", "offsets": "*i32", "out": "*bf16", "width": "i32"},
            {"BLOCK": 1024},
        ),
    ]
    return [
        Case(
            f"packed_attention/{kernel.__name__.removesuffix('_kernel')}",
            kernel,
            signature,
            constants,
            aligned=[name for name, kind in signature.items() if kind.startswith("*")],
        )
        for kernel, signature, constants in small
    ]
