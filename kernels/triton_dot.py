"""The one matrix product of all Triton kernels. Imports triton: import it inside functions only."""

import triton
import triton.language as tl

from tulu_hpc.kernels.triton_support import interpreting

_INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, products and sums in fp32.

    The interpreter keeps bf16 as 16-bit integers and would multiply those, silently; its operands are cast first. fp32
    operands are not rounded to tf32.
    """
    if _INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
