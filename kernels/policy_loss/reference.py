"""Clipped policy-gradient losses in plain torch: the specification.  Shapes: K scored tokens.

ratio  = exp(logprob - behaviour_logprob)
policy = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))   (PPO, arXiv 1707.06347; GRPO per token)
d      = clip(logprob - reference_logprob, -40, 40)
kl     = k1: d     k2: d^2 / 2     k3: exp(-d) - 1 + d, as expm1(-d) + d   (estimators of KL(policy || reference))
loss   = sum_k weight_k (policy_k + kl_coef kl_k)
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.registry import LossOutput

# Bound on a token's log-ratio to the reference, so that k3 of one stray token cannot overflow.
MAX_LOG_RATIO = 40.0


def kl_estimate(logprobs_K: Tensor, reference_logprobs_K: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference): "k1", "k2" or "k3" (expm1: no cancellation near zero)."""
    difference = (logprobs_K - reference_logprobs_K).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_kind must be k1, k2 or k3, got {kind!r}")


def policy_loss(
    logprobs_K: Tensor,
    behaviour_logprobs_K: Tensor,
    advantages_K: Tensor,
    clip_low: float,
    clip_high: float,
    reference_logprobs_K: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    weights_K: Tensor | None,
) -> LossOutput:
    """See the formulas above; metrics are unweighted sums over tokens."""
    log_ratio = logprobs_K - behaviour_logprobs_K
    ratio = log_ratio.exp()
    plain = -advantages_K * ratio
    clipped = -advantages_K * ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = torch.maximum(plain, clipped)
    loss = policy
    with torch.no_grad():
        metrics = {
            "policy/loss": policy.sum(),
            "policy/ratio": ratio.sum(),
            "policy/clip_fraction": (clipped > plain).to(ratio.dtype).sum(),
            "policy/behaviour_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    if reference_logprobs_K is not None:
        kl = kl_estimate(logprobs_K, reference_logprobs_K, kl_kind)
        loss = loss + kl_coef * kl
        metrics["policy/kl"] = kl.sum()
    total = (loss if weights_K is None else loss * weights_K).sum()
    return LossOutput(total, {name: value.detach() for name, value in metrics.items()})
