"""Row passes of the `cpu` backend: vectorised C++ in the compiled core (fp32)."""

import torch
from torch import Tensor

from tulu_hpc.kernels.linear_logprob.buffers import INVARIANT_ROWS
from tulu_hpc.kernels.native import check, core


class CpuRows:
    """See `problem.RowKernels`."""

    name = "cpu"
    invariant_rows = INVARIANT_ROWS

    def forward(
        self,
        logits_UC: Tensor,
        first: int,
        target_K: Tensor,
        row_start_U1: Tensor,
        state_3U: Tensor,
        picked_K: Tensor,
        inv_temperature: float,
        softcap: float,
    ) -> None:
        maximum, total, dot = state_3U
        code = core().linear_logprob_forward_cpu(
            logits_UC.data_ptr(),
            logits_UC.stride(0),
            logits_UC.shape[0],
            logits_UC.shape[1],
            first,
            target_K.data_ptr(),
            row_start_U1.data_ptr(),
            maximum.data_ptr(),
            total.data_ptr(),
            dot.data_ptr(),
            picked_K.data_ptr(),
            inv_temperature,
            softcap,
            torch.get_num_threads(),
        )
        check(code, "linear_logprob forward (cpu)")

    def backward(
        self,
        logits_UC: Tensor,
        logits_row_A: Tensor | None,
        out_AC: Tensor,
        first: int,
        target_K: Tensor,
        row_start_A1: Tensor,
        stats_K4: Tensor,
        grad_K4: Tensor,
        inv_temperature: float,
        softcap: float,
    ) -> None:
        code = core().linear_logprob_backward_cpu(
            logits_UC.data_ptr(),
            logits_UC.stride(0),
            0 if logits_row_A is None else logits_row_A.data_ptr(),
            out_AC.data_ptr(),
            out_AC.stride(0),
            out_AC.shape[0],
            out_AC.shape[1],
            first,
            target_K.data_ptr(),
            row_start_A1.data_ptr(),
            stats_K4.data_ptr(),
            grad_K4.data_ptr(),
            inv_temperature,
            softcap,
            torch.get_num_threads(),
        )
        check(code, "linear_logprob backward (cpu)")
