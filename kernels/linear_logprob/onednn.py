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
# Rows of the result that are made at once when it is added to something: it has no way to add in place.
ADD_ROWS = 512


@cache
def available() -> bool:
    """Whether this build of torch has oneDNN and the op that inductor also uses."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def suits(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether the product is one to give to oneDNN."""
    return a_MK.dtype == torch.float32 and _large(*a_MK.shape, b_KN.shape[1])


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a_MK), _dense(b_KN).T, None, "none", [], "")
    return out


def exact_product(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """out = a @ b, in sums of SUM_LENGTH terms."""
    for k in range(0, a_MK.shape[1], SUM_LENGTH):
        a, b = a_MK[:, k : k + SUM_LENGTH], b_KN[k : k + SUM_LENGTH]
        if k == 0:
            out_MN.copy_(product(a, b))
        else:
            out_MN.add_(product(a, b))


def add_product(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """total += a @ b."""
    for m in range(0, a_MK.shape[0], ADD_ROWS):
        total_MN[m : m + ADD_ROWS].add_(product(a_MK[m : m + ADD_ROWS], b_KN))


def exact_product_bytes(m: int, k: int, n: int, transposed: bool = False) -> int:
    """Temporaries of `exact_product`; transposed: a is the transpose of a matrix and b a matrix, else the reverse."""
    if not _large(m, k, n):
        return 0
    sliced = k > SUM_LENGTH
    copied = m if transposed else (m + n) * sliced
    return 4 * (m * n + copied * min(k, SUM_LENGTH))


def add_product_bytes(m: int, n: int) -> int:
    """Temporaries of `add_product` with a matrix as a."""
    return 4 * min(m, ADD_ROWS) * n


def _large(*sides: int) -> bool:
    return min(sides) >= SMALLEST


def _dense(x: Tensor) -> Tensor:
    """oneDNN has no fast path for other strides than those of a matrix or its transpose."""
    if x.is_contiguous() or x.T.is_contiguous():
        return x
    # In the order in which it lies: copying a transpose costs as much as the product.
    return x.T.contiguous().T if x.stride(0) == 1 else x.contiguous()
