"""What the attention kernels share: tiles of one head in memory, and where a query tile goes.

T query rows, M key rows, D head dim (padded to a power of two BLOCK_D).
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load(base, rows, real, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
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
def store(base, rows, real, stride, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    place = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = real[:, None] if HEAD_DIM == BLOCK_D else real[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def key_rows_of(table, keys, real, PERMUTED: tl.constexpr, MASKED: tl.constexpr):
    """Rows of k and v of these pack rows."""
    if PERMUTED:
        if MASKED:
            return tl.load(table + keys, mask=real, other=0)
        return tl.load(table + keys)
    return keys


@triton.jit
def walk(blocks, BLOCK_N: tl.constexpr):
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
