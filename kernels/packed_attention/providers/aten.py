"""The flash attention inside torch (FlashAttention 2; 3 or 4 where activated)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import VarlenCall
from tulu_hpc.kernels.packed_attention.providers.base import Provider
from tulu_hpc.kernels.schema import Wanted

_LENGTHS = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")


class Aten(Provider):
    """torch.ops.aten._flash_attention_forward and _backward: always there, not public.

    The backward pass reads torch.use_deterministic_algorithms itself. Log-sum-exp [N, T].
    """

    name = "aten"
    title = "flash attention inside torch"
    distribution = "torch"
    module = "torch.ops.aten"
    wanted = (
        Wanted("_flash_attention_forward", ("query", "key", "value", *_LENGTHS, "return_debug_mask"), ("scale",)),
        Wanted(
            "_flash_attention_backward",
            ("grad_out", "query", "key", "value", "out", "logsumexp", *_LENGTHS, "rng_state", "unused"),
            ("scale",),
        ),
    )

    def version(self) -> str:
        return torch.__version__

    def installed(self) -> bool:
        return True

    def find(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(torch.ops.aten, name)
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions["_flash_attention_forward"](
            *(q, k, v, call.cu_query, call.cu_key, call.most_queries, call.most_keys),
            *(0.0, call.causal, False),
            scale=scale,
        )
        return out, lse.t()

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = self.functions["_flash_attention_backward"](
            *(grad, q, k, v, out, lse.t().contiguous(), call.cu_query, call.cu_key),
            *(call.most_queries, call.most_keys, 0.0, call.causal, rng_state, unused),
            scale=scale,
        )
        return dq, dk, dv
