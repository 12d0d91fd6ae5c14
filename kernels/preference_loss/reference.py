"""Preference losses in plain torch: the specification. Differentiable; all arithmetic in fp64.

Shapes: K scored tokens, Q sequences, P pairs.

For a sequence q with n scored tokens, m = max(n, 1):

    S = sum of its log-probs, accumulated in fp64 and rounded to the dtype of the reference sums
        (so that equal models have a margin of exactly 0)
    x = S - ref              dpo, cdpo, robust, hinge, kto
        (S - ref) / m        dpo_norm (Tulu 3, arXiv 2411.15124 eq. 6), ipo
        S / m                simpo, orpo
    reward = beta x,    margin = reward_chosen - reward_rejected

Loss f of a pair, softplus(t) = log(1 + e^t) = -log sigmoid(-t), s = label_smoothing:

    dpo, dpo_norm   (1 - s) softplus(-margin) + s softplus(margin)     arXiv 2305.18290 eq. 7
    cdpo            the same as dpo, s > 0 (conservative DPO, https://ericmitchell.ai/cdpo.pdf)
    robust          ((1 - s) softplus(-margin) - s softplus(margin)) / (1 - 2 s)     arXiv 2403.00409
    simpo           softplus(gamma - margin), smoothed as dpo     arXiv 2405.14734 eq. 6
    ipo             (x_chosen - x_rejected - 1 / (2 beta))^2     arXiv 2310.12036 eq. 17; on per-token means, as TRL
                    (whose authors agreed it with the paper's), not on sums
    hinge           max(0, 1 - margin)     SLiC, arXiv 2305.10425, on log-ratios as in TRL
    orpo            beta softplus(-(g(x_chosen) - g(x_rejected))),  g(x) = x - log(1 - e^x) the log odds
                    arXiv 2403.07691 eq. 6 and 7; x is taken as at most -1e-6, with slope 0 beyond that
    kto             desirable_weight (1 - sigmoid(reward_chosen - beta z))
                    + undesirable_weight (1 - sigmoid(beta z - reward_rejected)),  z = max(0, kl)
                    arXiv 2402.01306 eq. 8; an entry of pairs may lack one side (-1), which then counts as 0

Per pair, with w = weights_P (1 if not given) and NLL the mean over the chosen sequence's tokens, -S_chosen / m_chosen:

    loss = w (v f + sft_weight NLL),    v = 1, or with weighting "wpo" (arXiv 2406.11827 eq. 2), without gradient,
    v = exp((S_chosen - A_chosen) / m_chosen) exp((S_rejected - A_rejected) / m_rejected)

A: `alignment_sums_Q`, sums over tokens of the log of sum over the vocabulary of p^2 (the paper's sampled alignment),
0 if not given.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tulu_hpc.kernels.preference_loss.problem import HINGE, ODDS, ODDS_LIMIT, SIGMOID, SQUARE, Options, Problem


def sequence_sums(logprobs_K: Tensor, sequence_id_K: Tensor, sequences: int) -> Tensor:
    """Sum of log-probs of each of Q sequences, fp64."""
    sums_Q = logprobs_K.new_zeros(sequences, dtype=torch.float64)  # fp32 would be off by more than a margin may be
    return sums_Q.index_add(0, sequence_id_K, logprobs_K.double())


def preference_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss, and the vector of sums that `problem.METRICS` names (entry 0 is the loss again), both fp64."""
    options, sequences = problem.options, problem.sequences
    if problem.policy_sums_Q is None:
        sums_Q = sequence_sums(problem.logprobs_K, problem.sequence_id_K, sequences)
    else:
        sums_Q = problem.policy_sums_Q.double()
    if problem.lengths_Q is not None:
        lengths_Q = problem.lengths_Q.double()
    elif problem.policy_sums_Q is None:
        ones_K = torch.ones_like(problem.logprobs_K, dtype=torch.float64, requires_grad=False)
        lengths_Q = torch.zeros_like(sums_Q, requires_grad=False).index_add(0, problem.sequence_id_K, ones_K)
    else:
        lengths_Q = torch.zeros_like(sums_Q, requires_grad=False)
    divisor_Q = lengths_Q.clamp(min=1)
    x_Q = sums_Q
    if problem.reference_sums_Q is not None:
        # The gradient is not rounded with them.
        rounded = sums_Q.detach().to(problem.reference_sums_Q.dtype).double()
        sums_Q = sums_Q + (rounded - sums_Q.detach())
        x_Q = sums_Q - problem.reference_sums_Q.double() if options.table.reference else sums_Q
    if options.table.mean:
        x_Q = x_Q / divisor_Q
    chosen, rejected = problem.pairs_P2.unbind(1)
    has_chosen, has_rejected = (chosen >= 0).double(), (rejected >= 0).double()
    chosen, rejected = chosen.clamp(min=0), rejected.clamp(min=0)
    x_chosen, x_rejected = x_Q[chosen] * has_chosen, x_Q[rejected] * has_rejected
    rewards_chosen, rewards_rejected = options.beta * x_chosen, options.beta * x_rejected
    if options.table.code in (SIGMOID, SQUARE, HINGE, ODDS):
        preference = pair_loss(x_chosen, x_rejected, options)
    else:
        z = x_Q.new_full((), options.kl) if problem.kl is None else problem.kl.detach().double().reshape(())
        z = options.beta * z.clamp(min=0)
        preference = has_chosen * options.desirable_weight * torch.sigmoid(z - rewards_chosen)
        preference = preference + has_rejected * options.undesirable_weight * torch.sigmoid(rewards_rejected - z)
    factor = torch.ones_like(preference)
    if options.wpo:
        factor = wpo_weights(sums_Q, divisor_Q, problem.alignment_sums_Q)[problem.pairs_P2].prod(1)
    nll = -sums_Q[chosen] / divisor_Q[chosen] * has_chosen
    weights = torch.ones_like(preference) if problem.weights_P is None else problem.weights_P.detach().double()
    sft = weights * options.sft_weight * nll
    loss = (weights * factor * preference + sft).sum()
    margins = rewards_chosen - rewards_rejected
    columns = (
        rewards_chosen,
        rewards_rejected,
        margins,
        (margins > 0).double(),
        sums_Q[chosen] * has_chosen,
        sums_Q[rejected] * has_rejected,
        lengths_Q[chosen] * has_chosen,
        lengths_Q[rejected] * has_rejected,
        has_chosen,
        has_rejected,
        sft,
        weights * factor,
    )
    return loss, torch.stack([loss.detach(), *(column.detach().sum() for column in columns)])


def pair_loss(x_chosen: Tensor, x_rejected: Tensor, options: Options) -> Tensor:
    """f of the paired kinds from the scores x."""
    margin = options.beta * (x_chosen - x_rejected)
    code = options.table.code
    if code == SIGMOID:
        a, b = options.softplus_weights
        z = margin - options.margin_shift
        return -a * logsigmoid(z) - b * logsigmoid(-z)
    if code == SQUARE:
        return (x_chosen - x_rejected - 0.5 / options.beta) ** 2
    if code == HINGE:
        return (1 - margin).clamp(min=0)
    odds = log_odds(x_chosen) - log_odds(x_rejected)
    return -options.beta * logsigmoid(odds)


def log_odds(x: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^x."""
    x = x.clamp(max=-ODDS_LIMIT)
    return x - torch.log(-torch.expm1(x))


def wpo_weights(sums_Q: Tensor, divisor_Q: Tensor, alignment_sums_Q: Tensor | None) -> Tensor:
    """exp of the mean (aligned) log-prob of each sequence, without gradient."""
    with torch.no_grad():
        aligned = sums_Q if alignment_sums_Q is None else sums_Q - alignment_sums_Q.double()
        return torch.exp(aligned / divisor_Q)
