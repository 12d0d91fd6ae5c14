"""FlashAttention 3 [2407.08608] for Hopper: the package flash_attn_3, module flash_attn_interface.

The signatures are those of flash_attn_3 3.0.0. The betas (3.0.0.b1) pass the window as a pair and are refused.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import VarlenCall
from tulu_hpc.kernels.packed_attention.providers.base import Capability, Provider, State
from tulu_hpc.kernels.schema import Wanted

_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_PLAIN = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "sm_margin": 0}
# Parts that a build may leave out.
_NEEDED = ("BACKWARD", "VARLEN", "HDIM64", "HDIM128")


class FlashAttention3(Provider):
    """Registered as torch ops. Log-sum-exp [N, T]; head dims are multiples of 8 up to 256.

    Its deterministic backward pass does not take head dims that it rounds up to 256, those above 192.
    """

    name = "fa3"
    title = "FlashAttention 3"
    distribution = "flash_attn_3"
    module = "flash_attn_interface"
    wanted = (
        Wanted(
            "_flash_attn_forward",
            ("q", "k", "v"),
            (*_LENGTHS, "softmax_scale", "causal"),
            {**_PLAIN, "qv": None, "attention_chunk": 0, "num_splits": 1, "pack_gqa": None}
            | {"seqused_q": None, "seqused_k": None, "page_table": None, "out_": None},
        ),
        Wanted(
            "_flash_attn_backward",
            ("dout", "q", "k", "v", "out", "softmax_lse"),
            (*_LENGTHS, "dq", "dk", "dv", "softmax_scale", "is_causal", "deterministic"),
            {**_PLAIN, "sequed_q": None, "sequed_k": None},
        ),
    )

    def _load(self) -> State:
        state = super()._load()
        lacks = [f for f in _NEEDED if self.build_flags().get(f"FLASHATTENTION_DISABLE_{f}")]
        if state.kind == "usable" and lacks:
            return State("broken", f"{self.distribution} {self.version()} was built without {', '.join(lacks)}")
        return state

    def build_flags(self) -> dict[str, bool]:
        """What the build left out, empty where it does not say."""
        if importlib.util.find_spec("flash_attn_config") is None:
            return {}
        config: dict[str, Any] = importlib.import_module("flash_attn_config").CONFIG
        return dict(config["build_flags"])

    def refusal(self, dtype: torch.dtype, head_dim: int, capability: Capability, deterministic: bool) -> str | None:
        flags = self.build_flags()
        if dtype == torch.float16 and flags.get("FLASHATTENTION_DISABLE_FP16"):
            return "was built without float16"
        if head_dim > 192 and flags.get("FLASHATTENTION_DISABLE_HDIM256"):
            return f"was built without head dim {head_dim}"
        if 128 < head_dim <= 192 and all(flags.get(f"FLASHATTENTION_DISABLE_HDIM{n}") for n in (192, 256)):
            return f"was built without head dim {head_dim}"
        return super().refusal(dtype, head_dim, capability, deterministic)

    def _refusal(self, head_dim: int, capability: Capability, deterministic: bool) -> str | None:
        if capability[0] != 9:
            return f"is for compute capability 9.x, this is {capability[0]}.{capability[1]}"
        if deterministic and head_dim > 192:
            return f"has no deterministic backward pass for head dim {head_dim}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.functions["_flash_attn_forward"](
            *(q, k, v),
            cu_seqlens_q=call.cu_query,
            cu_seqlens_k=call.cu_key,
            max_seqlen_q=call.most_queries,
            max_seqlen_k=call.most_keys,
            softmax_scale=scale,
            causal=call.causal,
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
        self.functions["_flash_attn_backward"](
            *(grad, q, k, v, out, lse.t().contiguous()),
            cu_seqlens_q=call.cu_query,
            cu_seqlens_k=call.cu_key,
            max_seqlen_q=call.most_queries,
            max_seqlen_k=call.most_keys,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=scale,
            is_causal=call.causal,
            deterministic=deterministic,
        )
        return dq, dk, dv
