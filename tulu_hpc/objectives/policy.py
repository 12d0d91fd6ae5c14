"""Clipped policy gradients (GRPO, PPO) on the scored tokens. Shapes: K scored tokens of this rank, Q sequences."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_hpc.kernels import policy_loss
from tulu_hpc.objectives.terms import Terms


def policy_terms(
    logprobs_K: Tensor,
    *,
    behaviour_logprobs_K: Tensor,
    advantages_K: Tensor,
    sequence_id_K: Tensor,
    lengths_Q: Tensor,
    normalisation: Literal["token_mean", "sequence_mean"],
    global_count: int,
    clip_low: float,
    clip_high: float,
    kind: Literal["grpo", "ppo"] = "grpo",
    dual_clip: float = math.inf,
    old_logprobs_K: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: Literal["k1", "k2", "k3"] = "k3",
    reference_logprobs_K: Tensor | None = None,
    cp_group: ProcessGroup | None = None,
) -> Terms:
    """Clipped surrogate plus `kl_coef` times the KL estimate to the reference (arXiv 2402.03300 eq. 3).

    Args:
        behaviour_logprobs_K: log-probs under the policy that sampled, fp32.
        old_logprobs_K: denominator of the ratio; None: behaviour_logprobs_K.
        advantages_K: advantage of the token (grpo: of its sequence).
        dual_clip: bound of the ratio where the advantage is negative (arXiv 1912.09729).
        lengths_Q: scored tokens of each sequence of the whole pack.
        normalisation: `token_mean` weighs every token of the global batch the same, `sequence_mean` every sequence.
        global_count: tokens (token_mean) or sequences (sequence_mean) of the global batch, all ranks.
        cp_group: only tells which rank counts sequences; all sums here are over this rank's own tokens.

    Metrics: `loss` in the chosen normalisation, and the kernel's token sums as means over tokens, under their names.

    Raises:
        ValueError: `global_count` is not positive.
    """
    if global_count < 1:
        raise ValueError(f"policy loss: the global batch has {global_count} units to average over")
    weights_K = None
    if normalisation == "sequence_mean":
        weights_K = lengths_Q.clamp(min=1).reciprocal()[sequence_id_K]
    out = policy_loss(
        logprobs_K,
        behaviour_logprobs_K,
        advantages_K,
        sequence_id_K,
        kind=kind,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        old_logprobs_K=old_logprobs_K,
        reference_logprobs_K=reference_logprobs_K,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        weights_K=weights_K,
    )
    tokens = float(logprobs_K.numel())
    units = tokens
    if normalisation == "sequence_mean":
        counted = cp_group is None or cp_group.rank() == 0
        units = float((lengths_Q > 0).sum()) if counted else 0.0
    metrics = {name: (value.detach(), tokens) for name, value in out.metrics.items() if name != "loss"}
    return Terms(loss=out.loss / global_count, metrics={"loss": (out.loss.detach(), units), **metrics})
