"""Packed attention in plain torch with a dense mask: the specification, and the fp64 oracle.

Shapes: T query rows, M key rows, N query heads, Nk key/value heads, D head dim.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.packed_attention.plan import AttentionPlan


def visible(plan: AttentionPlan, device: torch.device) -> Tensor:
    """Bool [T, M]: which key rows (in the order of k and v) each query sees."""
    mask = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.bool, device=device)
    for entry in plan.entries:
        queries = slice(entry.query_start, entry.query_stop)
        mask[queries, entry.prefix_start : entry.prefix_stop] = True
        count = entry.query_stop - entry.query_start
        keys = entry.key_stop - entry.key_start
        own = torch.ones(count, keys, dtype=torch.bool, device=device).tril(keys - count)
        mask[queries, entry.key_start : entry.key_stop] |= own
    return mask if plan.key_order is None else mask[:, plan.key_order.to(device)]


def _scores(q_TND: Tensor, k_MND: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    group = q_TND.shape[1] // k_MND.shape[1]
    scores = torch.einsum("tnd,mnd->ntm", q_TND, k_MND.repeat_interleave(group, 1)) * scale
    return scores.masked_fill(~visible(plan, q_TND.device), -torch.inf)


def attention_dense(q_TND: Tensor, k_MND: Tensor, v_MND: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """The definition; autograd gives the gradients. Use it in float64 as the oracle."""
    probabilities = _scores(q_TND, k_MND, plan, scale).softmax(-1)
    return torch.einsum("ntm,mnd->tnd", probabilities, v_MND.repeat_interleave(q_TND.shape[1] // k_MND.shape[1], 1))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and log-sum-exp [T, N], computed in fp32 (fp64 for fp64)."""
    scores = _scores(_wide(q), _wide(k), plan, scale)
    lse = scores.logsumexp(-1)
    values = _wide(v).repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = torch.einsum("ntm,mnd->tnd", (scores - lse[..., None]).exp(), values)
    return out.to(q.dtype).contiguous(), lse.T.contiguous()


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the saved output and log-sum-exp, as flash attention computes them."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    q_, k_, v_, grad_, out_ = (_wide(x) for x in (q, k, v, grad, out))
    keys, values = k_.repeat_interleave(group, 1), v_.repeat_interleave(group, 1)
    p = (_scores(q_, k_, plan, scale) - lse.T[..., None]).exp()
    dp = torch.einsum("tnd,mnd->ntm", grad_, values)
    ds = p * (dp - (grad_ * out_).sum(-1).T[..., None]) * scale
    dq = torch.einsum("ntm,mnd->tnd", ds, keys)
    dk = torch.einsum("ntm,tnd->mnd", ds, q_).unflatten(1, (kv_heads, group)).sum(2)
    dv = torch.einsum("ntm,tnd->mnd", p, grad_).unflatten(1, (kv_heads, group)).sum(2)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
