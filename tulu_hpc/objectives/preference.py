"""Direct preference optimisation on packs whose pairs hold their prompt once.

Shapes: K scored tokens of this rank, Q sequences of the pack, P pairs of the pack.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_hpc.kernels import preference_loss
from tulu_hpc.objectives.terms import Terms, sequence_sums


def preference_terms(
    logprobs_K: Tensor,
    *,
    sequence_id_K: Tensor,
    pairs_P2: Tensor,
    reference_sums_Q: Tensor,
    lengths_Q: Tensor,
    global_pairs: int,
    kind: Literal["dpo", "dpo_norm"],
    beta: float,
    label_smoothing: float = 0.0,
    cp_group: ProcessGroup | None = None,
) -> Terms:
    """Loss of the pack's pairs over the pairs of the global batch (arXiv 2305.18290 eq. 7; dpo_norm: Tulu 3 eq. 6).

    Args:
        logprobs_K: policy, fp32; a context-parallel rank has its own tokens only.
        sequence_id_K: sequence of each of these tokens.
        pairs_P2: sequence ids of (chosen, rejected).
        reference_sums_Q: reference log-prob of each sequence, fp32.
        lengths_Q: scored tokens of each sequence of the whole pack (dpo_norm divides by them).
        global_pairs: pairs of the global batch, all ranks.

    Metrics (means over pairs): `loss`, `rewards/{chosen,rejected,margins,accuracies}` (a reward is beta times the
    log-ratio, for dpo_norm of the per-token means) and `logps/{chosen,rejected}` (sums over a sequence).

    Raises:
        ValueError: no pair in the global batch.
    """
    if global_pairs < 1:
        raise ValueError(f"{kind} loss: the global batch has {global_pairs} pairs")
    num_sequences = reference_sums_Q.numel()
    sums_Q = sequence_sums(logprobs_K, sequence_id_K, num_sequences, cp_group)
    out = preference_loss(
        logprobs_K,
        sequence_id_K,
        reference_sums_Q,
        pairs_P2,
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        policy_sums_Q=sums_Q,
        lengths_Q=lengths_Q,
    )
    # Every context-parallel rank has the same pairs; the first one counts them.
    counted = 1.0 if cp_group is None or cp_group.rank() == 0 else 0.0
    pairs = pairs_P2.shape[0] * counted
    sums = {"loss": out.loss.detach(), **out.metrics}
    return Terms(loss=out.loss / global_pairs, metrics={name: (value * counted, pairs) for name, value in sums.items()})
