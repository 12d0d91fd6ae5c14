"""The small kernels beside the flash libraries: merge by log-sum-exp, and the sum of copies in a fixed order.

Shapes: N query heads, D head dim (padded to a power of two).
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from tulu_hpc.kernels.packed_attention.triton_tile import load, store


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
    one = load(out + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    two = load(part_out + head * HEAD_DIM, rows, real, stride, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    merged = one * (first_weight / divisor)[:, None] + two * (second_weight / divisor)[:, None]
    store(out + head * HEAD_DIM, rows, real, stride, merged, HEAD_DIM, BLOCK_D)


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
