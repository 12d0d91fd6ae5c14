"""Generalised advantage estimation in one Triton launch. Imports triton: import it inside functions only.

Shapes: K tokens, S segments. A program has a segment and goes over it from its end in blocks; within a block the
recurrence A_t = delta_t + c A_{t+1} is an associative scan of pairs (c, delta).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tulu_hpc.kernels.ahead_of_time import Case

_BLOCK = 1024


@triton.jit
def _combine(later_factor, later, factor, value):
    """First the later tokens (the scan runs in reverse), then an earlier one."""
    return later_factor * factor, value + factor * later


@triton.jit(do_not_specialize=["tokens"])
def gae_kernel(
    rewards, values, cu_seqlens, bootstrap, advantages, returns, tokens, gamma, decay, HAS_BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """decay = gamma * lam. Bounds outside 0..tokens are cut, so that no wrong table reads foreign memory."""
    segment = tl.program_id(0)
    begin = tl.maximum(tl.load(cu_seqlens + segment), 0).to(tl.int32)
    end = tl.minimum(tl.load(cu_seqlens + segment + 1), tokens).to(tl.int32)
    last_value = 0.0
    if HAS_BOOTSTRAP:
        last_value = tl.load(bootstrap + segment)
    carried = 0.0
    for done in range(0, end - begin, BLOCK):
        k = end - done - BLOCK + tl.arange(0, BLOCK)
        inside = k >= begin
        reward = tl.load(rewards + k, mask=inside, other=0.0)
        value = tl.load(values + k, mask=inside, other=0.0)
        next_value = tl.load(values + k + 1, mask=inside & (k + 1 < end), other=0.0)
        next_value = tl.where(k + 1 == end, last_value, next_value)
        delta = reward + gamma * next_value - value
        # The block's last token is the scan's first: what was carried enters there.
        delta = tl.where(tl.arange(0, BLOCK) == BLOCK - 1, delta + decay * carried, delta)
        factor = tl.full((BLOCK,), 1.0, tl.float32) * decay
        _, advantage = tl.associative_scan((factor, delta), 0, _combine, reverse=True)
        tl.store(advantages + k, advantage, mask=inside)
        tl.store(returns + k, advantage + value, mask=inside)
        carried = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, advantage, 0.0), 0)


def gae(
    rewards_K: Tensor, values_K: Tensor, cu_seqlens_S1: Tensor, gamma: float, lam: float, bootstrap_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `reference.gae`."""
    advantages_K, returns_K = torch.empty_like(rewards_K), torch.empty_like(rewards_K)
    segments = len(cu_seqlens_S1) - 1
    if segments > 0:
        gae_kernel[(segments,)](
            rewards_K,
            values_K,
            cu_seqlens_S1,
            rewards_K if bootstrap_S is None else bootstrap_S,
            advantages_K,
            returns_K,
            len(rewards_K),
            gamma,
            gamma * lam,
            HAS_BOOTSTRAP=bootstrap_S is not None,
            BLOCK=_BLOCK,
        )
    return advantages_K, returns_K


def ahead_of_time() -> list[Case]:
    """Both variants, with both types of the table."""
    pointers = ("rewards", "values", "cu_seqlens", "bootstrap", "advantages", "returns")
    signature = {**dict.fromkeys(pointers, "*fp32"), "tokens": "i32", "gamma": "fp32", "decay": "fp32"}
    return [
        Case(
            f"gae/{'bootstrap' if bootstrap else 'terminal'}/{index}",
            gae_kernel,
            {**signature, "cu_seqlens": f"*{index}"},
            {"HAS_BOOTSTRAP": bootstrap, "BLOCK": _BLOCK},
            aligned=pointers,
        )
        for bootstrap in (False, True)
        for index in ("i32", "i64")
    ]
