"""What every backend of policy_loss receives and returns.

Shapes: K scored tokens of this rank, Q sequences, M columns of the statistics.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# A log-ratio beyond this is replaced by it and has no gradient: neither exp nor its sums can overflow in fp32.
MAX_LOG_RATIO = 40.0

KINDS = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo")
KL_KINDS = ("k1", "k2", "k3")
IMPORTANCES = ("none", "truncated", "masked")
LEVELS = ("token", "sequence")
NORMALISATIONS = ("sum", "token_mean", "sequence_mean", "constant")

# Columns of the statistics: sums over tokens, then maxima, then minima, then the factor of the normalisation.
LOSS, POLICY, RATIO, CLIP_LOW, CLIP_HIGH, CLIPPED, DUAL_CLIP, BEHAVIOUR_KL, K1, K2, K3 = range(11)
IMPORTANCE, IMPORTANCE_LIMITED, ENTROPY, ACTIVE, TOKENS, UNITS, VIOLATIONS = range(11, 18)
SUMS = 18
RATIO_MAX, IMPORTANCE_MAX, RATIO_MIN, SCALE = range(18, 22)
COLUMNS = 32  # a power of two, for Triton

# Columns of the table of sequence sums.
LOG_RATIO_SUM, LOG_IMPORTANCE_SUM, LENGTH, POSITIVE, NEGATIVE = range(5)


@dataclass(frozen=True)
class Settings:
    """Everything about the loss that is not a tensor; the arguments of `policy_loss` with their defaults filled in."""

    kind: str
    kl_kind: str
    importance: str
    importance_level: str
    normalisation: str
    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    importance_low: float
    importance_high: float
    entropy_coef: float
    divisor: float
    num_sequences: int

    @property
    def lowest(self) -> float:
        """Lower bound of the ratio."""
        return 1 - self.clip_low

    @property
    def highest(self) -> float:
        """Upper bound of the ratio."""
        return 1 + self.clip_high

    @property
    def sequence_importance(self) -> bool:
        """One importance weight for a sequence."""
        return self.importance != "none" and self.importance_level == "sequence"

    @property
    def by_sequence(self) -> bool:
        """Sums over sequences are needed before a token's loss is known."""
        return self.kind == "gspo" or self.sequence_importance or self.normalisation == "sequence_mean"

    def host_scale(self, tokens: int, has_sums: bool) -> float:
        """The part of the normalisation that is known before anything is computed."""
        if self.normalisation == "constant":
            return 1 / self.divisor
        if self.normalisation == "token_mean" and not has_sums:
            return 1 / max(tokens, 1)
        return 1.0

    def counts_units(self, has_sums: bool) -> bool:
        """The loss is divided by a count that comes out of the sequences: they, or their tokens on all ranks."""
        return self.normalisation == "sequence_mean" or (self.normalisation == "token_mean" and has_sums)


class Inputs(NamedTuple):
    """Contiguous, on one device, float tensors of one dtype; `sums_Q5` as `policy_sequence_sums` returns it."""

    logprobs_K: Tensor
    behaviour_K: Tensor
    advantages_K: Tensor
    sequence_id_K: Tensor
    old_K: Tensor | None
    reference_K: Tensor | None
    weights_K: Tensor | None
    entropy_K: Tensor | None
    sums_Q5: Tensor | None


class Outputs(NamedTuple):
    """Normalised loss; its gradients before the factor `stats_M[SCALE]`; tokens with a gradient; statistics.

    gradient_entropy_K is empty when there are no entropies. stats_M[LOSS] is the loss.
    """

    loss: Tensor
    gradient_K: Tensor
    gradient_entropy_K: Tensor
    active_K: Tensor
    stats_M: Tensor


def empty_outputs(inputs: Inputs) -> Outputs:
    """Memory for a kernel to write to."""
    like = inputs.logprobs_K
    count = len(like)
    return Outputs(
        like.new_empty(()),
        like.new_empty(count),
        like.new_empty(count if inputs.entropy_K is not None else 0),
        like.new_empty(count, dtype=torch.bool),
        like.new_empty(COLUMNS),
    )
