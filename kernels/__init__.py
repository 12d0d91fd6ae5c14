"""Fused kernels for post-training, usable on their own: this package imports nothing of the rest of tulu_hpc.

    linear_logprob    log-probs (and entropy) of targets from hidden states, without ever holding the full logits
    packed_attention  causal attention over a flat pack of segments that may share prefixes
    rope              rotary embedding of packed queries and keys by position id
    preference_loss   DPO, IPO, SimPO, ORPO, KTO and other losses on per-token log-probs
    policy_loss       clipped policy-gradient losses on per-token log-probs; value_loss beside it
    gae               generalised advantage estimation of a pack; whiten, over the global batch

`available_backends(op)` says what can run here, `last_backend(op)` what ran last.
"""

from tulu_hpc.kernels.gae.ops import gae
from tulu_hpc.kernels.gae.whiten import whiten
from tulu_hpc.kernels.linear_logprob.ops import LogprobOutput, linear_logprob
from tulu_hpc.kernels.native import build_info
from tulu_hpc.kernels.packed_attention.ops import packed_attention
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan, plan_attention
from tulu_hpc.kernels.policy_loss.ops import PolicyLossOutput, policy_loss, policy_sequence_sums
from tulu_hpc.kernels.policy_loss.value import value_loss
from tulu_hpc.kernels.preference_loss.ops import preference_loss
from tulu_hpc.kernels.registry import BackendError, LossOutput, available_backends, last_backend
from tulu_hpc.kernels.rope.ops import rope, rope_tables

__all__ = [
    "AttentionPlan",
    "BackendError",
    "LogprobOutput",
    "LossOutput",
    "PolicyLossOutput",
    "available_backends",
    "build_info",
    "gae",
    "last_backend",
    "linear_logprob",
    "packed_attention",
    "plan_attention",
    "policy_loss",
    "policy_sequence_sums",
    "preference_loss",
    "rope",
    "rope_tables",
    "value_loss",
    "whiten",
]
