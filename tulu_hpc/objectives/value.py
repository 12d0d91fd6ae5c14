"""Rewards, advantages and the value loss of PPO, per token. Shapes: K scored tokens, Q sequences of the pack.

Token t of an answer is an action; its value is that of the state in which it was chosen, so the value model never sees
the token itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tulu_hpc.kernels import gae, value_loss
from tulu_hpc.kernels.policy_loss.reference import kl_estimate
from tulu_hpc.objectives.terms import Metric, Terms


def sequence_offsets(sequence_id_K: Tensor, num_sequences: int) -> Tensor:
    """[Q + 1] int64: targets offsets[q] to offsets[q + 1] (exclusive) of a pack belong to sequence q."""
    lengths_Q = torch.bincount(sequence_id_K, minlength=num_sequences)
    return torch.cat((lengths_Q.new_zeros(1), lengths_Q.cumsum(0)))


def token_rewards(
    rewards_Q: Tensor,
    offsets_Q1: Tensor,
    *,
    logprobs_K: Tensor | None = None,
    reference_logprobs_K: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: Literal["k1", "k2", "k3"] = "k1",
) -> tuple[Tensor, Tensor]:
    """([K] reward of each token, [K] KL estimate): the answer's reward on its last token, minus kl_coef KL everywhere.

    Args:
        rewards_Q: of the whole answers, fp32.
        offsets_Q1: from `sequence_offsets`; every sequence has a token.
        logprobs_K, reference_logprobs_K: of the policy that counts as the old one, and of the reference, over all
            tokens of the pack; nothing is differentiated. Without them the estimate is 0.
    """
    total = int(offsets_Q1[-1])
    kl_K = rewards_Q.new_zeros(total)
    if logprobs_K is not None and reference_logprobs_K is not None:
        kl_K = kl_estimate(logprobs_K.detach(), reference_logprobs_K.detach(), kl_kind)
    rewards_K = -kl_coef * kl_K
    rewards_K[offsets_Q1[1:] - 1] += rewards_Q
    return rewards_K, kl_K


def token_advantages(
    rewards_K: Tensor, values_K: Tensor, offsets_Q1: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """([K] advantages, [K] returns) by generalised advantage estimation (arXiv 1506.02438). Every answer counts as
    ended, also one that ran into the token limit: its penalty is its last reward."""
    return gae(rewards_K, values_K, offsets_Q1, gamma=gamma, lam=lam)


def value_terms(
    values_K: Tensor,
    *,
    old_values_K: Tensor,
    returns_K: Tensor,
    clip: float | None,
    coef: float,
    global_tokens: int,
) -> Terms:
    """`coef` times the clipped squared error over 2, mean over the tokens of the global minibatch.

    Args:
        values_K: of this rank's tokens, differentiable.
        old_values_K, returns_K: from before the first update.
        global_tokens: of the minibatch, all ranks.

    Metrics, means over tokens, without `coef`: loss, clip_fraction (values further than `clip` from the old ones),
    squared_error, value.

    Raises:
        ValueError: `global_tokens` is not positive.
    """
    if global_tokens < 1:
        raise ValueError(f"value loss: the minibatch has {global_tokens} tokens to average over")
    out = value_loss(values_K, old_values_K, returns_K, clip=clip)
    tokens = float(values_K.numel())
    metrics: dict[str, Metric] = {
        name.removeprefix("value/"): (value.detach(), tokens) for name, value in out.metrics.items()
    }
    return Terms(loss=coef * out.loss / global_tokens, metrics=metrics)
