"""Rotary position embedding of packed q and k in one launch.

Shapes: T rows, N query heads, Nk key heads, D head dim, R = 2 HALF rotated dims.
"""

import triton
import triton.language as tl

from tulu_hpc.kernels.ahead_of_time import Case


@triton.jit
def _turn(
    x,
    out,
    cos,
    sin,
    rows,
    row,
    place,
    place_out,
    direction,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    real = (row < rows)[:, None]
    base, base_out = place[:, None], place_out[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    mask = real & (pair < HALF)
    c = tl.load(cos + row[:, None] * HALF + pair, mask=mask, other=0.0)
    s = tl.load(sin + row[:, None] * HALF + pair, mask=mask, other=0.0) * direction
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, HALF + pair
    a = tl.load(x + base + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + base + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + base_out + first, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + base_out + second, (b * c + a * s).to(out.dtype.element_ty), mask=mask)
    if 2 * HALF < HEAD_DIM:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = real & (rest < HEAD_DIM)
        tl.store(out + base_out + rest, tl.load(x + base + rest, mask=mask), mask=mask)


@triton.jit
def rope_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    rows,
    heads,
    kv_heads,
    group,
    q_row_stride,
    q_group_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    direction,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid (row tiles, N + Nk): q's heads, then k's. direction: 1 forward, -1 backward.

    Query head h is head h % group of group h // group. The results are contiguous. cos and sin are [rows, HALF] fp32,
    made once per pack for all layers.
    """
    head = tl.program_id(1)
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    if head < heads:
        place = row * q_row_stride + head // group * q_group_stride + head % group * q_head_stride
        to = (row * heads + head) * HEAD_DIM
        _turn(q, q_out, cos, sin, rows, row, place, to, direction, HEAD_DIM, HALF, BLOCK_HALF, REST, INTERLEAVED)
    else:
        head -= heads
        place = row * k_row_stride + head * k_head_stride
        to = (row * kv_heads + head) * HEAD_DIM
        _turn(k, k_out, cos, sin, rows, row, place, to, direction, HEAD_DIM, HALF, BLOCK_HALF, REST, INTERLEAVED)


def ahead_of_time() -> list[Case]:
    """bf16, head dims 64, 128 and 256, both conventions; fp16 and fp32."""
    kinds = [("bf16", dim, interleaved) for dim in (64, 128, 256) for interleaved in (False, True)]
    kinds += [("fp16", 128, False), ("fp32", 128, False)]
    pointers = ("q", "k", "q_out", "k_out", "cos", "sin")
    strides = ("q_row_stride", "q_group_stride", "q_head_stride", "k_row_stride", "k_head_stride")
    return [
        Case(
            f"rope/rope/d{head_dim}{'' if kind == 'bf16' else f'_{kind}'}{'_interleaved' if interleaved else ''}",
            rope_kernel,
            {**dict.fromkeys(pointers[:4], f"*{kind}"), **dict.fromkeys(pointers[4:], "*fp32"), "direction": "fp32"}
            | dict.fromkeys(("rows", "heads", "kv_heads", "group", *strides), "i32"),
            {
                "HEAD_DIM": head_dim,
                "HALF": head_dim // 2,
                "BLOCK_HALF": head_dim // 2,
                "REST": 1,
                "BLOCK_ROWS": 16,
                "INTERLEAVED": interleaved,
            },
            aligned=[*pointers, *strides],
        )
        for kind, head_dim, interleaved in kinds
    ]
