"""fp32 matrix products by oneDNN, which torch carries beside MKL: twice as fast as MKL on AMD processors with AVX-512.

Shapes: M, N rows and columns of the result, K summed over.
"""

from functools import cache

import torch
from torch import Tensor

# A side below this gains nothing: MKL is at least as fast on thin matrices.
SMALLEST = 32
# oneDNN adds in one chain over K; sums of this many terms, added up, are as exact as MKL's.
SUM_LENGTH = 256


@cache
def available() -> bool:
    """Whether this build of torch has oneDNN and the op that inductor also uses."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def suits(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether the product is one to give to oneDNN."""
    return a_MK.dtype == torch.float32 and min(*a_MK.shape, b_KN.shape[1]) >= SMALLEST


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a_MK), _dense(b_KN).T, None, "none", [], "")
    return out


def exact_product(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """out = a @ b, in sums of SUM_LENGTH terms."""
    for k in range(0, a_MK.shape[1], SUM_LENGTH):
        part = product(a_MK[:, k : k + SUM_LENGTH], b_KN[k : k + SUM_LENGTH])
        if k == 0:
            out_MN.copy_(part)
        else:
            out_MN.add_(part)


def _dense(x: Tensor) -> Tensor:
    """oneDNN has no fast path for other strides than those of a matrix or its transpose."""
    if x.is_contiguous() or x.T.is_contiguous():
        return x
    # In the order in which it lies: copying a transpose costs as much as the product.
    return x.T.contiguous().T if x.stride(0) == 1 else x.contiguous()
