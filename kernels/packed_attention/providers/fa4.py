"""FlashAttention 4 in CuTe DSL for Hopper and Blackwell: the package flash-attn-4, module flash_attn.cute.

The signatures are those of flash-attn-4 4.0.0b27 to 4.0.0b36 (there is no release yet). Kernels are compiled at their
first call for a head dim.
"""

from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import VarlenCall
from tulu_hpc.kernels.packed_attention.providers.base import Capability, Provider
from tulu_hpc.kernels.schema import Wanted

_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_PLAIN = {"window_size_left": None, "window_size_right": None, "learnable_sink": None, "score_mod": None}


class FlashAttention4(Provider):
    """Plain functions. Log-sum-exp [N, T].

    Head dims are multiples of 8: up to 256 on 9.x, up to 128 and 256 itself on 10.x and 11.x. No backward pass on 8.x,
    no deterministic one on 12.x.
    """

    name = "fa4"
    title = "FlashAttention 4"
    distribution = "flash-attn-4"
    module = "flash_attn.cute.interface"
    wanted = (
        Wanted(
            "_flash_attn_fwd",
            ("q", "k", "v"),
            (*_LENGTHS, "softmax_scale", "causal", "return_lse"),
            {**_PLAIN, "softcap": None, "qv": None, "num_splits": 1, "pack_gqa": None, "mask_mod": None},
        ),
        Wanted(
            "_flash_attn_bwd",
            ("q", "k", "v", "out", "dout", "lse"),
            ("softmax_scale", "causal", *_LENGTHS, "deterministic"),
            {**_PLAIN, "softcap": 0.0, "dlse": None, "mask_mod": None},
        ),
    )

    def _refusal(self, head_dim: int, capability: Capability, deterministic: bool) -> str | None:
        major = capability[0]
        if major not in (9, 10, 11, 12):
            return f"has a backward pass on compute capability 9.x to 12.x, this is {major}.{capability[1]}"
        if major in (10, 11) and 128 < head_dim < 256:
            return f"takes head dims up to 128 and 256 on compute capability {major}.x, got {head_dim}"
        if major == 12 and deterministic:
            return "has no deterministic backward pass on compute capability 12.x"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        # The number of results has grown between versions; the first two stay.
        out, lse, *_ = self.functions["_flash_attn_fwd"](
            *(q, k, v),
            cu_seqlens_q=call.cu_query,
            cu_seqlens_k=call.cu_key,
            max_seqlen_q=call.most_queries,
            max_seqlen_k=call.most_keys,
            softmax_scale=scale,
            causal=call.causal,
            return_lse=True,
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
        dq, dk, dv, *_ = self.functions["_flash_attn_bwd"](
            *(q, k, v, out, grad, lse.t().contiguous()),
            softmax_scale=scale,
            causal=call.causal,
            cu_seqlens_q=call.cu_query,
            cu_seqlens_k=call.cu_key,
            max_seqlen_q=call.most_queries,
            max_seqlen_k=call.most_keys,
            deterministic=deterministic,
        )
        return dq, dk, dv
