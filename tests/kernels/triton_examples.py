"""Small Triton kernels that the tests of the tools run and compile."""

import triton
import triton.language as tl

from tulu_hpc.kernels.triton_dot import dot


@triton.jit
def product(a, b, out, SIZE: tl.constexpr, THROUGH_HELPER: tl.constexpr):
    """out = a @ b of [SIZE, SIZE] matrices."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    place = row * SIZE + column
    zero = tl.zeros((SIZE, SIZE), tl.float32)
    if THROUGH_HELPER:
        total = dot(tl.load(a + place), tl.load(b + place), zero)
    else:
        total = tl.dot(tl.load(a + place), tl.load(b + place), zero)
    tl.store(out + place, total)


@triton.jit
def spilling(a, out, SIZE: tl.constexpr):
    """Keeps too many values alive for one warp's registers."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(a + row * SIZE + column)
    tl.store(out + column * SIZE + row, tl.cumsum(x, 0) + tl.cumsum(x, 1) * tl.sum(x))
