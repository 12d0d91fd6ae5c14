"""cuDNN's fused attention as Transformer Engine calls it.

The signatures are those of Transformer Engine 2.15 to 2.20.2; earlier ones have other arguments and are refused. Rules
on versions and GPUs: nvte_get_fused_attn_backend in its common/fused_attn/fused_attn.cpp, which refuses the rest.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import VarlenCall
from tulu_hpc.kernels.packed_attention.providers.base import Capability, Provider, State
from tulu_hpc.kernels.registry import BackendError
from tulu_hpc.kernels.schema import Wanted

_LENGTHS = ("max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q", "cu_seqlens_kv")
_OPTIONS = ("cu_seqlens_q_padded", "cu_seqlens_kv_padded", "attn_scale", "qkv_layout", "o_format", "attn_mask_type")
_PLAIN = {"dropout": 0.0, "attn_bias_type": "no_bias", "softmax_type": "vanilla", "bottom_right_diagonal": None}
# From this product of sequences, heads and longest lengths on, a deterministic backward pass on Hopper asks for more
# workspace than the GPU has (Transformer Engine's attention/dot_product_attention/utils.py).
_MOST_DETERMINISTIC = 1 << 30


class TransformerEngine(Provider):
    """fused_attn_fwd and fused_attn_bwd on packed rows ("thd").

    Softmax statistics are the log-sum-exp, [T, N, 1] from cuDNN 9.6 on; Transformer Engine's own context parallelism
    merges them and gives the merged ones to the backward pass, as the `merge` strategy does. A new pack shape may mean
    a new cuDNN graph, so this library is never chosen by itself.
    """

    name = "te"
    title = "cuDNN attention of Transformer Engine"
    distribution = "transformer-engine"
    module = "transformer_engine.pytorch.cpp_extensions.fused_attn"
    wanted = (
        Wanted(
            "fused_attn_fwd",
            ("is_training", *_LENGTHS, "q", "k", "v", "fake_dtype", "fused_attention_backend"),
            (*_OPTIONS, "window_size"),
            {**_PLAIN, "attn_bias": None, "return_max_logit": False, "softmax_offset": None},
        ),
        Wanted(
            "fused_attn_bwd",
            (*_LENGTHS, "q", "k", "v", "o", "d_o", "fake_dtype", "aux_ctx_tensors", "fused_attention_backend"),
            (*_OPTIONS, "do_format", "dqkv_layout", "window_size", "deterministic"),
            _PLAIN,
        ),
    )
    _backend: Any = None
    _cudnn: tuple[int, ...] = ()

    def _load(self) -> State:
        state = super()._load()
        if state.kind != "usable":
            return state
        try:
            self._backend = self._library("cpp_extensions.fused_attn").FusedAttnBackend["F16_arbitrary_seqlen"]
            self._cudnn = tuple(self._library("utils").get_cudnn_version())
        except Exception as reason:
            text = f"{type(reason).__name__}: {reason}"
            return State("broken", f"{self.distribution} {self.version()}: no cuDNN attention: {text}")
        if self._cudnn < (9, 7, 0) or self._cudnn in ((9, 10, 0), (9, 10, 1)):
            version = ".".join(map(str, self._cudnn))
            return State(
                "broken", f"{self.distribution} uses cuDNN {version}: needs 9.7 or later, not 9.10.0 or 9.10.1"
            )
        return State("usable", f"{state.text}, cuDNN {'.'.join(map(str, self._cudnn))}")

    @staticmethod
    def _library(name: str) -> Any:
        return importlib.import_module(f"transformer_engine.pytorch.{name}")

    def _refusal(self, head_dim: int, capability: Capability, deterministic: bool) -> str | None:
        if capability < (9, 0) or capability[0] >= 12:
            return f"takes packed rows on compute capability 9.x to 11.x, this is {capability[0]}.{capability[1]}"
        if head_dim > 128 and capability[0] != 9 and (head_dim != 256 or self._loaded_cudnn() < (9, 25, 0)):
            return f"takes head dims up to 128 here (256 from cuDNN 9.25 on), got {head_dim}"
        if deterministic and capability[0] >= 10 and self._loaded_cudnn() < (9, 18, 1):
            return "has a deterministic backward pass on Blackwell from cuDNN 9.18.1 on"
        return None

    def _loaded_cudnn(self) -> tuple[int, ...]:
        self.state()
        return self._cudnn

    @staticmethod
    def _options(call: VarlenCall, scale: float) -> dict[str, Any]:
        """Arguments of both passes."""
        return {
            "cu_seqlens_q_padded": call.cu_query,
            "cu_seqlens_kv_padded": call.cu_key,
            "attn_scale": scale,
            "qkv_layout": "thd_thd_thd",
            "o_format": "thd",
            "attn_mask_type": "padding_causal_bottom_right" if call.causal else "padding",
            "window_size": (-1, 0) if call.causal else (-1, -1),
        }

    @staticmethod
    def _lengths(call: VarlenCall) -> tuple[Any, ...]:
        """Longest lengths in steps of 64, so that fewer graphs are built, and the cumulative lengths."""
        longest = (-(-most // 64) * 64 for most in (call.most_queries, call.most_keys))
        return (*longest, call.cu_query, call.cu_key)

    def _check_workspace(self, q: Tensor, call: VarlenCall) -> None:
        if not q.is_cuda or not torch.are_deterministic_algorithms_enabled():
            return
        most_q, most_k, *_ = self._lengths(call)
        size = len(call.query_lengths) * q.shape[1] * most_q * most_k
        if torch.cuda.get_device_capability(q.device) == (9, 0) and size >= _MOST_DETERMINISTIC:
            raise BackendError(
                f"packed_attention: 'flash:te': {len(call.query_lengths)} sequences x {q.shape[1]} heads x {most_q} x "
                f"{most_k} is beyond what cuDNN's deterministic backward pass has workspace for on Hopper; name "
                "another library or switch determinism off"
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        self._check_workspace(q, call)
        out, (statistics, *_) = self.functions["fused_attn_fwd"](
            *(True, *self._lengths(call), q, k, v, q.dtype, self._backend), **self._options(call, scale)
        )
        if statistics.shape != (*q.shape[:2], 1):
            raise BackendError(
                f"packed_attention: 'flash:te': softmax statistics are {list(statistics.shape)}, expected "
                f"{[*q.shape[:2], 1]}: this cuDNN pads them"
            )
        return out, statistics[..., 0]

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
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)
        dq, dk, dv, *_ = self.functions["fused_attn_bwd"](
            *(*self._lengths(call), q, k, v, out, grad, q.dtype, [lse.contiguous().unsqueeze(-1), no_dropout]),
            self._backend,
            **self._options(call, scale),
            do_format="thd",
            dqkv_layout="thd_thd_thd",
            deterministic=deterministic,
        )
        return dq, dk, dv
