"""Generalised advantage estimation in plain torch: the specification.  Shapes: K tokens, S segments.

Within a segment of tokens 0..n-1, V_n = its bootstrap value (0 after a terminal token), A_n = 0:
    delta_t  = r_t + gamma V_{t+1} - V_t
    A_t      = delta_t + gamma lam A_{t+1}
    return_t = A_t + V_t
arXiv 1506.02438 equations 11 to 16; return_t is the TD(lam) target of the value head.
"""

import torch
from torch import Tensor


def gae(
    rewards_K: Tensor, values_K: Tensor, cu_seqlens_S1: Tensor, gamma: float, lam: float, bootstrap_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(advantages [K], returns [K]), all segments in step, from their ends."""
    starts_S, ends_S = cu_seqlens_S1[:-1].long(), cu_seqlens_S1[1:].long()
    advantages_K = torch.zeros_like(rewards_K)
    next_value_S = rewards_K.new_zeros(len(starts_S)) if bootstrap_S is None else bootstrap_S
    advantage_S = torch.zeros_like(next_value_S)
    longest = int((ends_S - starts_S).max()) if len(starts_S) else 0
    for back in range(1, longest + 1):
        live_S = ends_S - back >= starts_S
        k_L = (ends_S - back)[live_S]
        delta_L = rewards_K[k_L] + gamma * next_value_S[live_S] - values_K[k_L]
        advantages_K[k_L] = delta_L + gamma * lam * advantage_S[live_S]
        advantage_S = advantage_S.masked_scatter(live_S, advantages_K[k_L])
        next_value_S = next_value_S.masked_scatter(live_S, values_K[k_L])
    return advantages_K, advantages_K + values_K
