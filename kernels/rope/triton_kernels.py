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
    stride,
    head,
    direction,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    real = (row < rows)[:, None]
    base = row[:, None] * stride + head * HEAD_DIM
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    mask = real & (pair < HALF)
    c = tl.load(cos + row[:, None] * HALF + pair, mask=mask, other=0.0)
    s = tl.load(sin + row[:, None] * HALF + pair, mask=mask, other=0.0) * direction
    if INTERLEAVED:
        first, second = base + 2 * pair, base + 2 * pair + 1
    else:
        first, second = base + pair, base + HALF + pair
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + second, (b * c + a * s).to(out.dtype.element_ty), mask=mask)
    if 2 * HALF < HEAD_DIM:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = real & (rest < HEAD_DIM)
        tl.store(out + base + rest, tl.load(x + base + rest, mask=mask), mask=mask)


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
    direction,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid (row tiles, N + Nk): q's heads, then k's. direction: 1 forward, -1 backward.

    cos and sin are [rows, HALF] fp32, made once per pack for all layers.
    """
    head = tl.program_id(1)
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    if head < heads:
        stride = heads * HEAD_DIM
        _turn(q, q_out, cos, sin, rows, row, stride, head, direction, HEAD_DIM, HALF, BLOCK_HALF, REST, INTERLEAVED)
    else:
        stride = kv_heads * HEAD_DIM
        head -= heads
        _turn(k, k_out, cos, sin, rows, row, stride, head, direction, HEAD_DIM, HALF, BLOCK_HALF, REST, INTERLEAVED)


def ahead_of_time() -> list[Case]:
    """bf16, head dims 64 and 128, both conventions."""
    pointers = {"q": "*bf16", "k": "*bf16", "q_out": "*bf16", "k_out": "*bf16", "cos": "*fp32", "sin": "*fp32"}
    return [
        Case(
            f"rope/rope/d{head_dim}{'_interleaved' if interleaved else ''}",
            rope_kernel,
            {**pointers, "rows": "i32", "heads": "i32", "kv_heads": "i32", "direction": "fp32"},
            {
                "HEAD_DIM": head_dim,
                "HALF": head_dim // 2,
                "BLOCK_HALF": head_dim // 2,
                "REST": 1,
                "BLOCK_ROWS": 16,
                "INTERLEAVED": interleaved,
            },
            aligned=[*pointers],
        )
        for head_dim in (64, 128)
        for interleaved in (False, True)
    ]
