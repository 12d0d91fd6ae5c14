"""Fused kernels for post-training, usable on their own: this package imports nothing of the rest of tulu_hpc.

    linear_logprob    log-probs (and entropy) of targets from hidden states, without ever holding the full logits
    packed_attention  causal attention over a flat pack of segments that may share prefixes
    preference_loss   DPO, IPO, SimPO, ORPO, KTO and other losses on per-token log-probs
    policy_loss       clipped policy-gradient losses on per-token log-probs

`available_backends(op)` says what can run here, `last_backend(op)` what ran last.
"""

from tulu_hpc.kernels.linear_logprob.ops import LogprobOutput, linear_logprob
from tulu_hpc.kernels.native import build_info
from tulu_hpc.kernels.packed_attention.ops import packed_attention
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, plan_attention
from tulu_hpc.kernels.policy_loss.ops import policy_loss
from tulu_hpc.kernels.preference_loss.ops import preference_loss
from tulu_hpc.kernels.registry import BackendError, LossOutput, available_backends, last_backend

__all__ = [
    "AttentionPlan",
    "BackendError",
    "LogprobOutput",
    "LossOutput",
    "available_backends",
    "build_info",
    "last_backend",
    "linear_logprob",
    "packed_attention",
    "plan_attention",
    "policy_loss",
    "preference_loss",
]
