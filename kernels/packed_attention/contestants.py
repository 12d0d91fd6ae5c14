"""Who takes part in the benchmark of packed_attention: our backends and other libraries, behind one signature.

Shapes: T rows, S segments, N query heads, Nk key/value heads, D head dim.
"""

import contextlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_hpc.kernels.contest import OURS, backends
from tulu_hpc.kernels.packed_attention import flash
from tulu_hpc.kernels.packed_attention.ops import packed_attention
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, plan_attention
from tulu_hpc.kernels.packed_attention.select import refusal
from tulu_hpc.kernels.registry import USABLE
from tulu_hpc.kernels.timing import Run

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        generator = torch.Generator(self.device).manual_seed(0)
        new = partial(torch.randn, generator=generator, device=self.device, dtype=self.dtype)
        q, k, v, grad = (
            new(self.rows, n, self.head_dim) for n in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        return q, k, v, grad

    def position_ids(self) -> Tensor:
        """[T] positions: a response goes on after its prefix."""
        pieces = [torch.arange(n) + (b - a) for n, (a, b) in zip(self.lengths, self.prefix)]
        return torch.cat(pieces).to(self.device)

    def cumulative(self) -> Tensor:
        return torch.tensor(self.cu_seqlens, dtype=torch.int32, device=self.device)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each row its segment, and the first and last + 1 row of its prefix."""
        lengths = torch.tensor(self.lengths)
        columns = (torch.arange(len(lengths)), *(torch.tensor(column) for column in zip(*self.prefix)))
        segment, low, high = (column.repeat_interleave(lengths).to(self.device) for column in columns)
        return segment, low, high


Maker = Callable[[Pack], Attention]


def exact(pack: Pack, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows_S: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and gradients of q [S, N, D] in float64 of some rows of a pack; a row needs no other row's result."""
    segment, low, high = pack.table()
    key, row = torch.arange(pack.rows, device=pack.device)[None], rows_S[:, None]
    own = (segment[rows_S][:, None] == segment[None]) & (row >= key)
    seen_ST = own | ((key >= low[rows_S][:, None]) & (key < high[rows_S][:, None]))
    with torch.enable_grad():
        chosen = q.detach()[rows_S].double().requires_grad_()
        grouped = chosen.unflatten(1, (pack.kv_heads, -1))
        scores = torch.einsum("skgd,tkd->kgst", grouped, k.detach().double()) * pack.head_dim**-0.5
        weights = scores.masked_fill(~seen_ST, -torch.inf).softmax(-1)
        out = torch.einsum("kgst,tkd->skgd", weights, v.detach().double()).flatten(1, 2)
        (gradient,) = torch.autograd.grad(out, chosen, grad[rows_S].double())
    return out.detach(), gradient


def of(layout: str, run: Run) -> dict[str, Maker]:
    """Contestants by name; each makes its function for a pack, or raises Unavailable."""
    found: dict[str, Maker] = {}
    for backend, status in backends("packed_attention", run).items():
        # A dense mask of all rows; the choice among the flash libraries, each of which has its own line.
        if backend in ("reference", flash.NAME):
            continue
        # Without a prefix the strategies are one.
        strategies = (None,) if layout == "expanded" or backend == "triton" else ("repeat", "merge")
        for strategy in strategies:
            name = " ".join(filter(None, (OURS, backend, strategy)))
            found[name] = partial(_ours, backend, status, strategy)
    if layout == "shared":
        return found | {"flex": _flex}
    libraries: dict[str, Maker] = {"varlen_attn": _varlen, "sdpa": _sdpa, "cudnn": _cudnn, "flex": _flex}
    return found | libraries | {"flash_attn": _flash_attn}


def _ours(backend: str, status: str, strategy: str | None, pack: Pack) -> Attention:
    reason = refusal(backend, pack.device.type, pack.dtype, pack.head_dim) if status == USABLE else status
    if reason is not None:
        raise Unavailable(reason)
    plan = pack.plan(strategy)
    return lambda q, k, v: packed_attention(q, k, v, plan, backend=backend)


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
    options = varlen_options(attention, pack.heads != pack.kv_heads)
    return lambda q, k, v: attention(q, k, v, cu, cu, longest, longest, **options)


def varlen_options(attention: Callable[..., Any], grouped: bool) -> dict[str, Any]:
    """How `varlen_attn` of this torch is asked for causal attention with grouped heads.

    Raises:
        Unavailable: it has no argument for causal attention.
    """
    names = inspect.signature(attention).parameters
    options: dict[str, Any] = {"enable_gqa": True} if grouped and "enable_gqa" in names else {}
    if "window_size" in names:
        return {"window_size": (-1, 0), **options}
    if "is_causal" in names:  # up to torch 2.10; a window came later
        return {"is_causal": True, **options}
    raise Unavailable(f"torch {torch.__version__}: varlen_attn has neither window_size nor is_causal")


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
    """FlexAttention with the pack's mask, compiled for its shape; on CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment, low, high = pack.table()

    def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (segment[row] == segment[key]) & (row >= key)
        return own | ((key >= low[row]) & (key < high[row]))

    block_mask = create_block_mask(mask, None, None, pack.rows, pack.rows, device=pack.device.type)
    # With sizes as variables its CPU code does not compile (torch 2.13).
    flex: Any = torch.compile(flex_attention, dynamic=False)
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
