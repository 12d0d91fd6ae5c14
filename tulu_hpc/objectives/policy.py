"""Clipped policy gradients (the GRPO family, PPO).  Shapes: K scored tokens of this rank, Q sequences of the pack."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_hpc.kernels import policy_loss, policy_sequence_sums
from tulu_hpc.objectives.terms import Terms

# rloo is REINFORCE: at the first update its gradient is that of the token's ratio, which is 1 there.
_KERNEL_KINDS = {"rloo": "grpo"}
_IMPORTANCES = {"truncate": "truncated", "mask": "masked"}
# Columns of `kernels.policy_sequence_sums`.
_LOG_IMPORTANCE, _LENGTH = 1, 2


def policy_terms(
    logprobs_K: Tensor,
    *,
    behaviour_logprobs_K: Tensor,
    advantages_K: Tensor,
    sequence_id_K: Tensor,
    lengths_Q: Tensor,
    normalisation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"],
    global_count: int,
    constant_length: int = 1,
    kind: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo"] = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: Literal["k1", "k2", "k3"] = "k3",
    reference_logprobs_K: Tensor | None = None,
    old_logprobs_K: Tensor | None = None,
    importance: Literal["none", "token", "sequence", "geometric"] = "none",
    importance_mode: Literal["truncate", "mask"] = "truncate",
    importance_low: float = 0.5,
    importance_cap: float = 2.0,
    cp_group: ProcessGroup | None = None,
) -> Terms:
    """Clipped surrogate plus `kl_coef` times the KL estimate to the reference; every kind's formula: docs/policy.md.

    Args:
        behaviour_logprobs_K: log-probs under the policy that sampled, fp32.
        advantages_K: advantage of the token (all kinds but ppo: of its sequence).
        lengths_Q: scored tokens of each sequence of the whole pack.
        normalisation: `token_mean` weighs every token of the global batch the same; the others every sequence, by the
            mean over its tokens, their sum, or (`constant`) their sum over `constant_length`.
        global_count: tokens (token_mean) or sequences (else) of the global batch, all ranks.
        clip_low, clip_high: empty: the kind's own.
        old_logprobs_K: of this model before the first update on these samples; the ratio is then to these, and
            the importance weight, which needs them, is proximal over behaviour (decoupled PPO, arXiv 2505.24298).
        importance: level of the weight: `token`, `sequence` (product over its tokens) or `geometric` (their mean).
        importance_mode: `truncate` at importance_cap, or `mask`: 0 outside importance_low to importance_cap.
        cp_group: ranks that hold other parts of the same sequences; sums over a sequence run over them.

    Metrics: `loss` in the chosen normalisation, and the kernel's token sums as means over tokens, under their names
    (`policy/surrogate` for its `policy/loss`).

    Raises:
        ValueError: `global_count` is not positive; importance weights without `old_logprobs_K`.
    """
    if global_count < 1:
        raise ValueError(f"policy loss: the global batch has {global_count} units to average over")
    weights_K = None
    if normalisation == "sequence_mean":
        weights_K = lengths_Q.clamp(min=1).reciprocal()[sequence_id_K]
    elif normalisation == "constant":
        weights_K = logprobs_K.new_full(logprobs_K.shape, 1 / constant_length)
    weighting: dict[str, Any] = {}
    if importance != "none":
        weighting = {
            "importance": _IMPORTANCES[importance_mode],
            "importance_level": "token" if importance == "token" else "sequence",
            "importance_low": importance_low,
            "importance_high": importance_cap,
        }
    columns = (logprobs_K, behaviour_logprobs_K, advantages_K, sequence_id_K)
    sums_Q5 = None
    shared = cp_group is not None and cp_group.size() > 1
    if importance == "geometric" or (shared and (kind == "gspo" or importance == "sequence")):
        sums_Q5 = policy_sequence_sums(
            *columns,
            num_sequences=lengths_Q.numel(),
            old_logprobs_K=old_logprobs_K,
            weights_K=weights_K,
            **weighting,
        )
        if shared:
            dist.all_reduce(sums_Q5, group=cp_group)
        if importance == "geometric":
            sums_Q5[:, _LOG_IMPORTANCE] /= sums_Q5[:, _LENGTH].clamp(min=1)
    out = policy_loss(
        *columns,
        kind=_KERNEL_KINDS.get(kind, kind),
        clip_low=clip_low,
        clip_high=clip_high,
        # The kernel has a bound of its own for ppo; here none is none.
        dual_clip=math.inf if dual_clip is None and kind == "ppo" else dual_clip,
        old_logprobs_K=old_logprobs_K,
        reference_logprobs_K=reference_logprobs_K,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        weights_K=weights_K,
        num_sequences=lengths_Q.numel(),
        sequence_sums_Q5=sums_Q5,
        **weighting,
    )
    tokens = float(logprobs_K.numel())
    units = tokens
    if normalisation != "token_mean":
        counted = cp_group is None or cp_group.rank() == 0
        units = float((lengths_Q > 0).sum()) if counted else 0.0
    # `policy/loss` is the unweighted surrogate alone; it must not be taken for the loss.
    names = {name: "policy/surrogate" if name == "policy/loss" else name for name in out.metrics}
    metrics = {names[name]: (value.detach(), tokens) for name, value in out.metrics.items()}
    return Terms(loss=out.loss / global_count, metrics={"loss": (out.loss.detach(), units), **metrics})
