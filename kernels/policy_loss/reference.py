"""Policy-gradient losses in plain torch, with their gradients: the specification.

Shapes: K scored tokens of this rank, Q sequences, M columns of the statistics.

Per token, with b(x) = x bounded to [-40, 40] (no gradient beyond), old = behaviour unless given:
    l = logprob - old                                 gspo: l = mean of (logprob - old) over the sequence's tokens
    ratio = exp(b(l)),  A = advantage
    ppo, grpo, dr_grpo, dapo, gspo:
        policy = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high));  A < 0: at most -A dual_clip
    cispo:
        policy = -A stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) logprob
    i = exp(b(old - behaviour)), or for a sequence exp(b(sum of old - behaviour)), without gradient
    importance = 1;   truncated: min(i, importance_high);   masked: i if importance_low <= i <= importance_high else 0
    d = b(logprob - reference);   kl = k1: d    k2: d^2 / 2    k3: exp(-d) - 1 + d, as expm1(-d) + d
    loss = scale sum_k weight_k (importance_k policy_k + kl_coef kl_k - entropy_coef entropy_k)
    scale = sum: 1    constant: 1 / divisor    token_mean: 1 / tokens    sequence_mean: 1 / (sequences length_k)

Gradient for the log-prob of token k of sequence q, with s_k = d policy / d l (0 where a clip holds), c = scale weight:
    c_k (importance_k s_k + kl_coef d kl / d logprob)
    gspo: in place of the first term, the sum of c importance s over q's tokens, divided by their number

Sources: PPO arXiv 1707.06347, dual clip 1912.09729, GRPO 2402.03300, Dr. GRPO 2503.20783 (constant divisor), DAPO
2503.14476 (clip_high > clip_low, token mean), GSPO 2507.18071, CISPO 2506.13585; estimators of KL(policy || reference):
http://joschu.net/blog/kl-approx.html.
"""

import torch
from torch import Tensor

from tulu_hpc.kernels.policy_loss import problem
from tulu_hpc.kernels.policy_loss.problem import MAX_LOG_RATIO, Inputs, Outputs, Settings


def bound(x: Tensor) -> Tensor:
    """x within the range where exp is finite; NaN stays NaN."""
    return x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_estimate(logprobs_K: Tensor, reference_logprobs_K: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference): "k1", "k2" or "k3" (expm1: no cancellation near zero)."""
    d = bound(logprobs_K - reference_logprobs_K)
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl_kind must be k1, k2 or k3, got {kind!r}")


def _kl_slope(logprobs_K: Tensor, reference_logprobs_K: Tensor, kind: str) -> Tensor:
    difference = logprobs_K - reference_logprobs_K
    d = bound(difference)
    slope = {"k1": torch.ones_like(d), "k2": d, "k3": -torch.expm1(-d)}[kind]
    return slope.masked_fill(difference.abs() > MAX_LOG_RATIO, 0)


def limit_importance(log_weight: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The importance weight after truncation or masking, and where one of these applied."""
    raw = bound(log_weight).exp()
    if settings.importance == "truncated":
        limited = raw > settings.importance_high
        return raw.masked_fill(limited, settings.importance_high), limited
    limited = (raw < settings.importance_low) | (raw > settings.importance_high)
    return raw.masked_fill(limited, 0), limited


def sequence_sums(inputs: Inputs, settings: Settings) -> Tensor:
    """[Q, 5]: sum of log-ratios, sum of log importance weights, tokens, sums of weight importance A over A > 0, A < 0.

    The importance weight in the last two is the token's; that of a sequence is a common factor.
    """
    x = inputs
    old_K = x.behaviour_K if x.old_K is None else x.old_K
    advantage_K = x.advantages_K if x.weights_K is None else x.advantages_K * x.weights_K
    if settings.importance != "none" and not settings.sequence_importance:
        advantage_K = advantage_K * limit_importance(old_K - x.behaviour_K, settings)[0]
    positive_K = x.advantages_K > 0
    columns_K5 = torch.stack(
        (
            x.logprobs_K - old_K,
            old_K - x.behaviour_K,
            torch.ones_like(old_K),
            advantage_K.where(positive_K, 0),
            advantage_K.where(~positive_K, 0),
        ),
        dim=1,
    )
    # fp64: an fp32 running sum over thousands of tokens is off by more than the clip range of gspo may be.
    sums_Q5 = torch.zeros(settings.num_sequences, 5, dtype=torch.float64, device=old_K.device)
    return sums_Q5.index_add_(0, x.sequence_id_K, columns_K5.double()).to(old_K.dtype)


def evaluate(inputs: Inputs, settings: Settings) -> Outputs:
    """Loss, gradients, active tokens and statistics by the formulas above."""
    x, s = inputs, settings
    old_K = x.behaviour_K if x.old_K is None else x.old_K
    log_ratio_K = x.logprobs_K - old_K
    weight_K = torch.ones_like(old_K) if x.weights_K is None else x.weights_K
    scale = s.host_scale(len(old_K), x.sums_Q5 is not None)
    sums_Q5, units = x.sums_Q5, old_K.new_zeros(())
    if sums_Q5 is None and s.by_sequence:
        sums_Q5 = sequence_sums(x, s)
    if sums_Q5 is not None:
        length_K = sums_Q5[x.sequence_id_K, problem.LENGTH].clamp(min=1)
        lengths_Q = sums_Q5[:, problem.LENGTH]
        units = (lengths_Q > 0).sum() if s.normalisation == "sequence_mean" else lengths_Q.sum()
    factor_K = torch.full_like(old_K, scale)
    if s.normalisation == "sequence_mean":
        factor_K = factor_K / length_K

    importance_K, limited_K = torch.ones_like(old_K), torch.zeros_like(old_K, dtype=torch.bool)
    if s.sequence_importance:
        assert sums_Q5 is not None
        log_importance_Q = sums_Q5[:, problem.LOG_IMPORTANCE_SUM]
        importance_K, limited_K = (y[x.sequence_id_K] for y in limit_importance(log_importance_Q, s))
    elif s.importance != "none":
        importance_K, limited_K = limit_importance(old_K - x.behaviour_K, s)

    level_K = log_ratio_K
    if s.kind == "gspo":
        assert sums_Q5 is not None
        level_K = sums_Q5[x.sequence_id_K, problem.LOG_RATIO_SUM] / length_K
    ratio_K = bound(level_K).exp()
    low_K, high_K = ratio_K < s.lowest, ratio_K > s.highest
    dual_K = torch.zeros_like(low_K)
    if s.kind == "cispo":
        slope_K = -ratio_K.clamp(s.lowest, s.highest) * x.advantages_K
        policy_K = slope_K * x.logprobs_K
    else:
        beyond_K = level_K.abs() > MAX_LOG_RATIO
        down_K = low_K | (ratio_K > s.dual_clip) | beyond_K  # where a negative advantage has no gradient
        dual_K = (x.advantages_K < 0) & (ratio_K > s.dual_clip)
        held_K = ratio_K.clamp(max=s.highest).where(x.advantages_K > 0, ratio_K.clamp(s.lowest, s.dual_clip))
        policy_K = -x.advantages_K * held_K
        no_slope_K = (high_K | beyond_K).where(x.advantages_K > 0, down_K)
        slope_K = (-x.advantages_K * ratio_K).masked_fill(no_slope_K, 0)
        low_K, high_K = low_K & (x.advantages_K < 0), high_K & (x.advantages_K > 0)
    gradient_K = weight_K * importance_K * slope_K
    if s.kind == "gspo":
        assert sums_Q5 is not None
        up_K = sums_Q5[x.sequence_id_K, problem.POSITIVE].masked_fill(ratio_K > s.highest, 0)
        down_K = sums_Q5[x.sequence_id_K, problem.NEGATIVE].masked_fill(down_K, 0)
        pull_K = (-ratio_K * (up_K + down_K)).masked_fill(beyond_K, 0) / length_K
        gradient_K = pull_K * importance_K if s.sequence_importance else pull_K
    total_K = importance_K * policy_K

    stats_M = old_K.new_zeros(problem.COLUMNS)
    if x.reference_K is not None:
        for column, kind in zip((problem.K1, problem.K2, problem.K3), problem.KL_KINDS, strict=True):
            stats_M[column] = kl_estimate(x.logprobs_K, x.reference_K, kind).sum()
        if s.kl_coef:
            total_K = total_K + s.kl_coef * kl_estimate(x.logprobs_K, x.reference_K, s.kl_kind)
            gradient_K = gradient_K + weight_K * s.kl_coef * _kl_slope(x.logprobs_K, x.reference_K, s.kl_kind)
    gradient_entropy_K = old_K.new_empty(0)
    if x.entropy_K is not None:
        total_K = total_K - s.entropy_coef * x.entropy_K
        gradient_entropy_K = -s.entropy_coef * weight_K * factor_K
        stats_M[problem.ENTROPY] = x.entropy_K.sum()
    gradient_K = gradient_K * factor_K
    active_K = gradient_K != 0
    if x.entropy_K is not None:
        active_K = active_K | (gradient_entropy_K != 0)

    if s.counts_units(x.sums_Q5 is not None):
        stats_M[problem.UNITS] = units
        stats_M[problem.SCALE] = 1 / stats_M[problem.UNITS].clamp(min=1)
    else:
        stats_M[problem.SCALE] = 1
    behaviour_ratio_K = bound(x.logprobs_K - x.behaviour_K)
    for column, value_K in (
        (problem.LOSS, weight_K * factor_K * total_K),
        (problem.POLICY, importance_K * policy_K),
        (problem.RATIO, ratio_K),
        (problem.CLIP_LOW, low_K),
        (problem.CLIP_HIGH, high_K),
        (problem.CLIPPED, low_K | high_K),
        (problem.DUAL_CLIP, dual_K),
        (problem.BEHAVIOUR_KL, torch.expm1(behaviour_ratio_K) - behaviour_ratio_K),
        (problem.IMPORTANCE, importance_K),
        (problem.IMPORTANCE_LIMITED, limited_K),
        (problem.ACTIVE, active_K),
    ):
        stats_M[column] = value_K.sum()
    stats_M[problem.TOKENS] = len(old_K)
    stats_M[problem.LOSS] *= stats_M[problem.SCALE]
    for column, value_K in ((problem.RATIO_MAX, ratio_K), (problem.IMPORTANCE_MAX, importance_K)):
        stats_M[column] = value_K.amax() if len(old_K) else -torch.inf
    stats_M[problem.RATIO_MIN] = ratio_K.amin() if len(old_K) else torch.inf
    return Outputs(stats_M[problem.LOSS].clone(), gradient_K, gradient_entropy_K, active_K, stats_M)
