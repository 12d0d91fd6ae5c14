"""Stands in for attention libraries that cannot run here: their recorded signatures around the dense definition.

A call binds to the real signature, so the order of arguments, layouts, alignment and the way of gradients are executed.
It proves nothing about the libraries' kernels; tests/gpu runs those.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

# provider -> version -> function -> parameters, read from the source of these releases: flash-attn (2.8.4: repository
# at 0251105a), flash_attn_3 (3.0.0.b1: in flash-attn 2.8.3; 3.0.0: repository at 0251105a), flash-attn-4 (b27: tag
# fa4-v4.0.0.beta27) and transformer-engine.
SIGNATURES: dict[str, dict[str, dict[str, list[list[Any]]]]] = json.loads(
    (Path(__file__).parent / "data" / "library_signatures.json").read_text()
)
Call = dict[str, Any]


def signature(parameters: list[list[Any]]) -> inspect.Signature:
    """Of a recorded function."""
    plain = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(p[0], kind, default=plain(p[1]) if len(p) > 1 else inspect.Parameter.empty)
            for p in parameters
        ]
    )


def with_signature(declared: inspect.Signature, body: Callable[[Call], Any]) -> Callable[..., Any]:
    """A function of this signature; `body` gets its arguments by name, defaults included."""

    def function(*arguments: Any, **options: Any) -> Any:
        bound = declared.bind(*arguments, **options)
        bound.apply_defaults()
        return body(dict(bound.arguments))

    function.__signature__ = declared  # type: ignore[attr-defined]
    return function


# --------------------------------------------------------------------------------------------- the dense definition
def _mask(cu_q: Tensor, cu_k: Tensor, causal: bool) -> Tensor:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    mask = torch.zeros(int(cu_q[-1]), int(cu_k[-1]), dtype=torch.bool)
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())):
        block = torch.ones(b - a, d - c, dtype=torch.bool)
        mask[a:b, c:d] = block.tril((d - c) - (b - a)) if causal else block
    return mask


def _scores(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float) -> Tensor:
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("tnd,mnd->ntm", q, keys) * scale
    return scores.masked_fill(~_mask(cu_q, cu_k, causal), -torch.inf)


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, N, D] in the dtype of q, log-sum-exp [N, T] in fp32."""
    dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
    scores = _scores(q, k, cu_q, cu_k, causal, scale)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("ntm,mnd->tnd", scores.softmax(-1), values).to(dtype), scores.logsumexp(-1)


def dense_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_NT: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As flash attention: with any output and log-sum-exp."""
    dtype, (grad, q, k, v, out) = q.dtype, (x.float() for x in (grad, q, k, v, out))
    group = q.shape[1] // k.shape[1]
    p = (_scores(q, k, cu_q, cu_k, causal, scale) - lse_NT[..., None]).exp()
    dp = torch.einsum("tnd,mnd->ntm", grad, v.repeat_interleave(group, 1))
    ds = p * (dp - (grad * out).sum(-1).T[..., None]) * scale
    dq = torch.einsum("ntm,mnd->tnd", ds, k.repeat_interleave(group, 1))
    dk = torch.einsum("ntm,tnd->mnd", ds, q).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("ntm,tnd->mnd", p, grad).unflatten(1, (-1, group)).sum(2)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _checked(call: Call) -> tuple[Tensor, Tensor]:
    """Cumulative lengths, after checking that the longest lengths are theirs."""
    lengths = (call["cu_seqlens_q"], call.get("cu_seqlens_k", call.get("cu_seqlens_kv")))
    longest = (call["max_seqlen_q"], call.get("max_seqlen_k", call.get("max_seqlen_kv")))
    for cu, most in zip(lengths, longest):
        assert cu is not None and most >= int(cu.diff().max())
    return lengths  # type: ignore[return-value]


def _no_window(call: Call) -> None:
    for name in ("window_size_left", "window_size_right"):
        assert call.get(name) in (None, -1)
    assert call.get("softcap") in (None, 0.0) and call.get("dropout_p", 0.0) == 0.0


def _dense(call: Call, causal: str) -> tuple[Tensor, Tensor]:
    _no_window(call)
    return dense_forward(*(call[x] for x in "qkv"), *_checked(call), call[causal], call["softmax_scale"])


def _dense_gradients(call: Call, causal: str, lse: str) -> tuple[Tensor, Tensor, Tensor]:
    _no_window(call)
    assert call[lse].is_contiguous() and call[lse].shape == call["q"].shape[1::-1], "log-sum-exp is [N, T] contiguous"
    operands = (call[x] for x in ("dout", "q", "k", "v", "out", lse))
    return dense_backward(*operands, *_checked(call), call[causal], call["softmax_scale"])


def _filled(call: Call, gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The compiled libraries write into dq, dk, dv and return something else."""
    for name, value in zip(("dq", "dk", "dv"), gradients):
        call[name].copy_(value)
    return torch.empty(0)


# ------------------------------------------------------------------------------------------------- Transformer Engine
def _te_mask(call: Call) -> bool:
    causal = call["attn_mask_type"] == "padding_causal_bottom_right"
    assert causal or call["attn_mask_type"] == "padding"
    assert call["window_size"] == ((-1, 0) if causal else (-1, -1)) and call["dropout"] == 0.0
    assert call["qkv_layout"] == "thd_thd_thd" and call["o_format"] == "thd" and call["fake_dtype"] == call["q"].dtype
    assert call["fused_attention_backend"] == "cuDNN" and call["max_seqlen_q"] % 64 == call["max_seqlen_kv"] % 64 == 0
    for side in ("q", "kv"):
        assert torch.equal(call[f"cu_seqlens_{side}_padded"], call[f"cu_seqlens_{side}"])
    return causal


def _te_forward(call: Call) -> Any:
    assert call["is_training"] is True  # otherwise there are no statistics
    out, lse = dense_forward(*(call[x] for x in "qkv"), *_checked(call), _te_mask(call), call["attn_scale"])
    return out, [lse.t().unsqueeze(-1).contiguous(), torch.zeros(2, dtype=torch.int64)]


def _te_backward(call: Call) -> Any:
    assert call["do_format"] == "thd" and call["dqkv_layout"] == "thd_thd_thd"
    statistics, state = call["aux_ctx_tensors"]
    assert statistics.shape == (*call["q"].shape[:2], 1) and statistics.is_contiguous() and state.shape == (2,)
    operands = (call[x] for x in ("d_o", "q", "k", "v", "o"))
    lse = statistics[..., 0].t()
    return dense_backward(*operands, lse, *_checked(call), _te_mask(call), call["attn_scale"])


# provider -> function -> what it does with its arguments
BODIES: dict[str, dict[str, Callable[[Call], Any]]] = {
    "fa2": {
        "_flash_attn_varlen_forward": lambda c: (*_dense(c, "causal"), None, None),
        "_flash_attn_varlen_backward": lambda c: _filled(c, _dense_gradients(c, "causal", "softmax_lse")),
    },
    "fa3": {
        "_flash_attn_forward": lambda c: (*_dense(c, "causal"), None, None),
        "_flash_attn_backward": lambda c: _filled(c, _dense_gradients(c, "is_causal", "softmax_lse")),
    },
    "fa4": {
        "_flash_attn_fwd": lambda c: (*(_dense(c, "causal") if c["return_lse"] else (None, None)), None, None, None),
        "_flash_attn_bwd": lambda c: _dense_gradients(c, "causal", "lse"),
    },
    "te": {"fused_attn_fwd": _te_forward, "fused_attn_bwd": _te_backward},
}
NEWEST = {"fa2": "2.8.3.post2", "fa3": "3.0.0", "fa4": "4.0.0b36", "te": "2.20.2"}


def new_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module that `import` finds, with the packages around it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=end < len(parts))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
            if end > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module, raising=False)
    for key, value in content.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    return sys.modules[name]


def install(monkeypatch: pytest.MonkeyPatch, provider: Any, functions: dict[str, inspect.Signature]) -> list[Call]:
    """Puts the library of `provider` in place with these signatures; returns the list of calls it will get."""
    calls: list[Call] = []

    def recorded(body: Callable[[Call], Any]) -> Callable[[Call], Any]:
        def run(call: Call) -> Any:
            calls.append(call)
            return body(call)

        return run

    bodies = BODIES[provider.name]
    content = {name: with_signature(declared, recorded(bodies[name])) for name, declared in functions.items()}
    new_module(monkeypatch, provider.module, **content)
    if provider.name == "te":
        new_module(monkeypatch, provider.module, FusedAttnBackend={"F16_arbitrary_seqlen": "cuDNN"})
        new_module(monkeypatch, "transformer_engine.pytorch.utils", get_cudnn_version=lambda: (9, 19, 0))
    return calls
