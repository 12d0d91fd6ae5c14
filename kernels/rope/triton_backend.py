"""Triton backend: both tensors in one launch.

Shapes: T rows, N query heads, Nk key heads, G query heads to a key head, D head dim, R rotated dims.
"""

from torch import Tensor

_BLOCK_ROWS = 16


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float
) -> tuple[Tensor, Tensor]:
    """q [T, N, D] or [T, Nk, G, D] and k [T, Nk, D] turned by cos, sin [T, R / 2] fp32; direction -1: turned back."""
    from tulu_hpc.kernels.rope import triton_kernels

    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = (x.new_empty(x.shape) for x in (q, k))
    grouped = q if q.dim() == 4 else q[:, None]
    rows, groups, group, head_dim = grouped.shape
    heads, half = groups * group, cos.shape[-1]
    if rows and heads + k.shape[1]:
        triton_kernels.rope_kernel[(-(-rows // _BLOCK_ROWS), heads + k.shape[1])](
            *(q, k, q_out, k_out, cos, sin, rows, heads, k.shape[1], max(group, 1)),
            *(*grouped.stride()[:3], *k.stride()[:2], direction),
            HEAD_DIM=head_dim,
            HALF=half,
            BLOCK_HALF=_power(half),
            REST=_power(head_dim - 2 * half),
            BLOCK_ROWS=_BLOCK_ROWS,
            INTERLEAVED=interleaved,
        )
    return q_out, k_out
