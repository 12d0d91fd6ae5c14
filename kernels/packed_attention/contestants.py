"""Who takes part in the benchmark of packed_attention: our backends and other libraries, behind one signature.

Shapes: T rows, S segments, N query heads, Nk key/value heads, D head dim.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_hpc.kernels.packed_attention import flash
from tulu_hpc.kernels.packed_attention.ops import packed_attention
from tulu_hpc.kernels.packed_attention.plan import STRATEGIES, AttentionPlan, plan_attention
from tulu_hpc.kernels.packed_attention.reference import attention_dense
from tulu_hpc.kernels.packed_attention.select import BACKENDS, refusal
from tulu_hpc.kernels.registry import USABLE, available_backends

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_LIBRARIES = [name for name in flash.NAMED if name != "flash:aten"]


class Unavailable(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass
class Pack:
    """A layout with the kind of its tensors."""

    cu_seqlens: list[int]
    prefix: list[tuple[int, int]]
    heads: int
    kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:])]

    @property
    def pairs(self) -> int:
        return sum(n * (b - a) + n * (n + 1) // 2 for n, (a, b) in zip(self.lengths, self.prefix))

    def plan(self, strategy: str | None = None) -> AttentionPlan:
        return plan_attention(
            self.cu_seqlens,
            self.prefix,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            device=self.device,
            strategy=strategy,
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and an upstream gradient."""
        generator = torch.Generator().manual_seed(0)
        new = lambda n: torch.randn(self.rows, n, self.head_dim, generator=generator)  # noqa: E731
        q, k, v, grad = (
            new(n).to(self.device, self.dtype) for n in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        return q, k, v, grad

    def position_ids(self) -> Tensor:
        """[T] positions: a response goes on after its prefix."""
        pieces = [torch.arange(n) + (b - a) for n, (a, b) in zip(self.lengths, self.prefix)]
        return torch.cat(pieces).to(self.device)

    def cumulative(self) -> Tensor:
        return torch.tensor(self.cu_seqlens, dtype=torch.int32, device=self.device)


Maker = Callable[[Pack], Attention]


def error(make: Maker, pack: Pack) -> float:
    """Largest absolute difference of the output from the definition in float64."""
    q, k, v, _ = pack.tensors()
    function = make(pack)
    with torch.no_grad():
        want = attention_dense(q.double(), k.double(), v.double(), pack.plan(), pack.head_dim**-0.5)
        return float((function(q, k, v).double() - want).abs().max())


def of(layout: str, device: str) -> dict[str, Maker]:
    """Contestants by name; each makes its function for a pack, or raises Unavailable."""
    libraries = list(flash.NAMED) if device == "cuda" else ["cpu"]
    if layout == "shared":
        return {
            **{f"{name} {how}": _ours(name, how) for name in libraries for how in STRATEGIES},
            "triton": _ours("triton", None),
            "flex": _flex,
        }
    return {
        **{name: _ours(name, None) for name in libraries},
        "triton": _ours("triton", None),
        "varlen_attn": _varlen,
        "sdpa": _sdpa,
        "cudnn": _cudnn,
        "flex": _flex,
        "flash_attn": _flash_attn,
    }


@contextlib.contextmanager
def findings(name: str) -> Iterator[None]:
    """What another library raises is a finding, as Unavailable; what one of our kernels raises is an error."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as reason:
        if name.split()[0] in BACKENDS and name.split()[0] not in _LIBRARIES:
            raise
        lines = [line for line in str(reason).strip().splitlines() if line] or [""]
        raise Unavailable(f"{type(reason).__name__}: {lines[0][:120]}") from reason


def _ours(backend: str, strategy: str | None) -> Maker:
    def make(pack: Pack) -> Attention:
        status = available_backends("packed_attention")[backend]
        reason = refusal(backend, pack.device.type, pack.dtype, pack.head_dim) if status == USABLE else status
        if reason is not None:
            raise Unavailable(reason)
        plan = pack.plan(strategy)
        return lambda q, k, v: packed_attention(q, k, v, plan, backend=backend)

    return make


def _varlen(pack: Pack) -> Attention:
    """torch's public variable-length attention."""
    if pack.device.type != "cuda":
        raise Unavailable("CUDA only")
    attention: Any  # its signature moved between versions of torch
    try:
        from torch.nn.attention.varlen import varlen_attn as attention
    except ImportError as reason:
        raise Unavailable(str(reason)) from reason
    cu, longest = pack.cumulative(), max(pack.lengths)
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if pack.heads != pack.kv_heads:
        options["enable_gqa"] = True
    return lambda q, k, v: attention(q, k, v, cu, cu, longest, longest, **options)


def _sdpa(pack: Pack, backend: Any = None) -> Attention:
    """scaled_dot_product_attention on sequences of one length."""
    if len(set(pack.lengths)) != 1:
        raise Unavailable("takes sequences of one length")
    shape = (len(pack.lengths), pack.lengths[0])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import sdpa_kernel

        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=pack.heads != pack.kv_heads)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def _cudnn(pack: Pack) -> Attention:
    if pack.device.type != "cuda":
        raise Unavailable("CUDA only")
    from torch.nn.attention import SDPBackend

    return _sdpa(pack, SDPBackend.CUDNN_ATTENTION)


def _flex(pack: Pack) -> Attention:
    """FlexAttention with the pack's mask, compiled on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(pack.lengths)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths).to(pack.device)
    low, high = (torch.tensor(column).repeat_interleave(lengths).to(pack.device) for column in zip(*pack.prefix))

    def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (segment[row] == segment[key]) & (row >= key)
        return own | ((key >= low[row]) & (key < high[row]))

    block_mask = create_block_mask(mask, None, None, pack.rows, pack.rows, device=pack.device.type)
    flex: Any = torch.compile(flex_attention) if pack.device.type == "cuda" else flex_attention
    gqa = pack.heads != pack.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return flex(*batch, block_mask=block_mask, enable_gqa=gqa)[0].transpose(0, 1)

    return call


def _flash_attn(pack: Pack) -> Attention:
    """The flash-attn package, version 3 before 2."""
    if pack.device.type != "cuda":
        raise Unavailable("CUDA only")
    reasons = []
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            function = importlib.import_module(module).flash_attn_varlen_func
            break
        except ImportError as reason:
            reasons.append(str(reason))
    else:
        raise Unavailable("; ".join(reasons))
    cu, longest = pack.cumulative(), max(pack.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = function(q, k, v, cu, cu, longest, longest, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return call
