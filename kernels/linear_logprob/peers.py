"""Other libraries' ways to the same log-probs, for the tests (numeric oracles) and the benchmark.

Shapes: N rows with one target each, H hidden, V vocabulary. Every function takes (hidden_NH, weight_VH, target_N) and
returns log-probs [N], differentiable, 0 for targets of -100.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    """F.linear + log_softmax + gather: what a trainer without a fused op does."""
    keep_N = target_N != -100
    logprobs_NV = F.linear(hidden_NH, weight_VH).float().log_softmax(-1)
    return logprobs_NV.gather(1, target_N.where(keep_N, 0)[:, None])[:, 0].where(keep_N, 0)


def torch_chunked(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    """torch's own linear cross-entropy on its chunked path."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden_NH, weight_VH, target_N, reduction="none", ignore_index=-100, options=options)


def liger(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    """Liger's fused linear scaled cross-entropy: its best kernel for the device, on CPU chunks of 512 tokens."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden_NH, weight_VH, target_N)
    nll: Tensor = out[0] if isinstance(out, tuple) else out
    return -nll


def cut_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    """Apple's cut cross-entropy: its Triton kernel on CUDA, its compiled torch path elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if hidden_NH.is_cuda else "torch_compile"
    nll: Tensor = linear_cross_entropy(hidden_NH, weight_VH, target_N, reduction="none", impl=implementation)
    return -nll


COMPILED = "torch compiled"


def table() -> dict[str, Peer | str]:
    """Every peer, or the reason why it cannot be called here."""
    found: dict[str, Peer | str] = {
        # Each shape on its own: sizes as variables would be slower, and there are few of them.
        COMPILED: torch.compile(dense, dynamic=False),
        "torch chunked": torch_chunked,
        "liger": liger,
        "cut-cross-entropy": cut_cross_entropy,
    }
    if not hasattr(F, "linear_cross_entropy"):
        found["torch chunked"] = f"torch {torch.__version__} has no linear_cross_entropy"
    for name, module in (("liger", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy")):
        if not importlib.util.find_spec(module):
            found[name] = f"{module} is not installed (extra `peers`)"
    return found


def available() -> dict[str, Peer]:
    """The peers that can be called here."""
    return {name: peer for name, peer in table().items() if not isinstance(peer, str)}
