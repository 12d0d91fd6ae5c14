"""The gated activation of a SwiGLU MLP [2002.05202] on a CPU (fp32), one pass over memory in each direction.

Shapes: T rows, F features.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.native import check, core


def forward(both_T2F: Tensor) -> Tensor:
    """[T, F] silu(gate) * up of rows [gate | up].

    Raises:
        ValueError: not a contiguous fp32 matrix on the CPU with an even number of columns.
    """
    rows, width = _sizes(both_T2F)
    out = both_T2F.new_empty(rows, width)
    code = core().gated_forward_cpu(both_T2F.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
    check(code, "gated forward (cpu)")
    return out


def backward(both_T2F: Tensor, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `both_T2F` and, made again on the way, the output [T, F] of `forward`.

    Raises:
        ValueError: as `forward`; or the gradient does not fit.
    """
    rows, width = _sizes(both_T2F)
    if grad_TF.shape != (rows, width) or grad_TF.dtype != torch.float32 or not grad_TF.is_contiguous():
        raise ValueError(
            f"the gradient is {grad_TF.dtype} {list(grad_TF.shape)}; contiguous fp32 [{rows}, {width}] fits"
        )
    grad_both, out = torch.empty_like(both_T2F), torch.empty_like(grad_TF)
    pointers = (x.data_ptr() for x in (both_T2F, grad_TF, grad_both, out))
    check(core().gated_backward_cpu(*pointers, rows, width, torch.get_num_threads()), "gated backward (cpu)")
    return grad_both, out


def _sizes(both_T2F: Tensor) -> tuple[int, int]:
    if both_T2F.ndim != 2 or both_T2F.shape[1] % 2:
        raise ValueError(f"rows of two halves are needed, got {list(both_T2F.shape)}")
    if both_T2F.dtype != torch.float32 or both_T2F.device.type != "cpu" or not both_T2F.is_contiguous():
        raise ValueError(f"contiguous fp32 on the CPU is needed, got {both_T2F.dtype} on {both_T2F.device}")
    return both_T2F.shape[0], both_T2F.shape[1] // 2
