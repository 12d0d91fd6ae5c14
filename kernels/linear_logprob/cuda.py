"""Row passes of the `cuda` backend: CUDA kernels of the compiled core (fp32 logits, fp32 or bf16 gradients)."""

import torch
from torch import Tensor

from tulu_hpc.kernels.native import check, core


class CudaRows:
    """See `problem.RowKernels`. Launches go to torch's current stream of the tensors' device."""

    name = "cuda"
    # cuBLAS promises nothing about the order of its sums.
    invariant_rows = None

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
        with torch.cuda.device(logits_UC.device):
            code = core().linear_logprob_forward_cuda(
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
                torch.cuda.current_stream().cuda_stream,
            )
        check(code, "linear_logprob forward (cuda)")

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
        with torch.cuda.device(logits_UC.device):
            code = core().linear_logprob_backward_cuda(
                logits_UC.data_ptr(),
                logits_UC.stride(0),
                0 if logits_row_A is None else logits_row_A.data_ptr(),
                out_AC.data_ptr(),
                out_AC.stride(0),
                out_AC.dtype == torch.bfloat16,
                out_AC.shape[0],
                out_AC.shape[1],
                first,
                target_K.data_ptr(),
                row_start_A1.data_ptr(),
                stats_K4.data_ptr(),
                grad_K4.data_ptr(),
                inv_temperature,
                softcap,
                torch.cuda.current_stream().cuda_stream,
            )
        check(code, "linear_logprob backward (cuda)")
