"""DPO losses in plain torch: the specification.

Shapes: K scored tokens, Q sequences, P pairs.

With pi and ref the sums of log-probs of a sequence (dpo), or those sums divided by its number of scored tokens
(dpo_norm, Tulu 3's length-normalised DPO, arXiv 2411.15124 section 5):
    margin = beta ((pi_chosen - ref_chosen) - (pi_rejected - ref_rejected))
    loss   = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin),   s = label smoothing (conservative DPO)
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tulu_hpc.kernels.registry import LossOutput


def sequence_sums(logprobs_K: Tensor, sequence_id_K: Tensor, sequences: int) -> Tensor:
    """Sum of log-probs of each of Q sequences, fp32 (fp64 for fp64)."""
    sums_Q = logprobs_K.new_zeros(sequences, dtype=torch.float64)  # an fp32 running sum loses digits of the margin
    return sums_Q.index_add(0, sequence_id_K, logprobs_K.double()).to(logprobs_K.dtype)


def preference_loss(
    policy_sums_Q: Tensor,
    reference_sums_Q: Tensor,
    lengths_Q: Tensor | None,
    pairs_P2: Tensor,
    beta: float,
    smoothing: float,
) -> LossOutput:
    """The loss from sequence sums; `lengths_Q` given: sums are divided by them (dpo_norm)."""
    ratio_Q = policy_sums_Q - reference_sums_Q
    if lengths_Q is not None:
        # A sequence without scored tokens has sums 0 and counts as 0.
        ratio_Q = ratio_Q / lengths_Q.clamp(min=1)
    chosen, rejected = pairs_P2.unbind(1)
    rewards_chosen, rewards_rejected = beta * ratio_Q[chosen], beta * ratio_Q[rejected]
    margins = rewards_chosen - rewards_rejected
    losses = -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)
    with torch.no_grad():
        metrics = {
            "rewards/chosen": rewards_chosen.sum(),
            "rewards/rejected": rewards_rejected.sum(),
            "rewards/margins": margins.sum(),
            "rewards/accuracies": (margins > 0).to(losses.dtype).sum(),
            "logps/chosen": policy_sums_Q[chosen].sum(),
            "logps/rejected": policy_sums_Q[rejected].sum(),
        }
    return LossOutput(losses.sum(), {name: value.detach() for name, value in metrics.items()})
