"""FlashAttention 2 [2307.08691]: the package flash-attn, its compiled functions under the public ones.

The signatures are those of flash-attn 2.7.0 to 2.8.4. From 2.1 on causal is aligned to the bottom right.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import VarlenCall
from tulu_hpc.kernels.packed_attention.providers.base import Provider
from tulu_hpc.kernels.schema import Wanted

_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_NUMBERS = ("dropout_p", "softmax_scale", "causal")
_WINDOW = ("window_size_left", "window_size_right", "softcap", "alibi_slopes")


class FlashAttention2(Provider):
    """Registered as torch ops. Log-sum-exp [N, T]; head dims are multiples of 8 up to 256 in both passes.

    `deterministic` sums dQ in a fixed order and needs a copy of dQ in fp32 per block of keys that runs at once.
    """

    name = "fa2"
    title = "FlashAttention 2"
    distribution = "flash-attn"
    module = "flash_attn.flash_attn_interface"
    wanted = (
        Wanted(
            "_flash_attn_varlen_forward",
            ("q", "k", "v", *_LENGTHS, *_NUMBERS),
            (),
            {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
            | {"return_softmax": False, "block_table": None, "leftpad_k": None, "seqused_k": None},
        ),
        Wanted(
            "_flash_attn_varlen_backward",
            ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_LENGTHS, *_NUMBERS, *_WINDOW)
            + ("deterministic",),
            (),
            {"rng_state": None},  # no dropout, no state
        ),
    )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions["_flash_attn_varlen_forward"](
            *(q, k, v, call.cu_query, call.cu_key, call.most_queries, call.most_keys),
            *(0.0, scale, call.causal),
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
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        self.functions["_flash_attn_varlen_backward"](
            *(grad, q, k, v, out, lse.t().contiguous(), dq, dk, dv, call.cu_query, call.cu_key),
            *(call.most_queries, call.most_keys, 0.0, scale, call.causal, -1, -1, 0.0, None),
            deterministic,
        )
        return dq, dk, dv
