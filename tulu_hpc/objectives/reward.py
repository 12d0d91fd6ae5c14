"""Reward model: Bradley-Terry on the scores of two answers. Shapes: K read-outs of this rank, Q sequences, P pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_hpc.objectives.sources import pair_source_metrics
from tulu_hpc.objectives.terms import Metric, Terms, sequence_sums


def pair_scores(
    scores_K: Tensor,
    *,
    sequence_id_K: Tensor,
    num_sequences: int,
    pairs_P2: Tensor,
    cp_group: ProcessGroup | None = None,
) -> Tensor:
    """[P, 2] fp32 scores of chosen and rejected, on every context-parallel rank.

    Args:
        scores_K: value at the read-out of this rank's answers; every sequence has one (`data.readout`).
        sequence_id_K: sequence of each of these.
    """
    # A sum with a single addend: the read-out lies on one context-parallel rank.
    return sequence_sums(scores_K, sequence_id_K, num_sequences, cp_group)[pairs_P2]


def pair_losses(scores_P2: Tensor) -> Tensor:
    """[P] -log sigmoid(chosen - rejected), Bradley-Terry's negative log-likelihood [2203.02155 eq. 1]."""
    return -F.logsigmoid(scores_P2[:, 0] - scores_P2[:, 1])


def pair_metrics(scores_P2: Tensor) -> dict[str, Tensor]:
    """Sums over pairs: `loss`, `rewards/{chosen,rejected,margins,accuracies}`; equal scores are not accurate."""
    scores_P2 = scores_P2.detach()
    margins = scores_P2[:, 0] - scores_P2[:, 1]
    return {
        "loss": pair_losses(scores_P2).sum(),
        "rewards/chosen": scores_P2[:, 0].sum(),
        "rewards/rejected": scores_P2[:, 1].sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": (margins > 0).to(margins.dtype).sum(),
    }


def reward_terms(
    scores_P2: Tensor,
    *,
    global_pairs: int,
    cp_group: ProcessGroup | None = None,
    sources: Sequence[str] = (),
    source_names: Sequence[str] = (),
) -> Terms:
    """Loss of the pack's pairs over the pairs of the global batch, and the means of `pair_metrics` over pairs.

    Args:
        scores_P2: from `pair_scores`, the same on every context-parallel rank.
        global_pairs: pairs of the global batch, all ranks.
        sources, source_names: of the pack's pairs, and of the whole run (none: no metrics by source).

    Raises:
        ValueError: no pair in the global batch.
    """
    if global_pairs < 1:
        raise ValueError(f"reward model: the global batch has {global_pairs} pairs")
    # Every context-parallel rank has the same pairs; the first one counts them.
    counted = 1.0 if cp_group is None or cp_group.rank() == 0 else 0.0
    pairs = scores_P2.shape[0] * counted
    metrics: dict[str, Metric] = {name: (value * counted, pairs) for name, value in pair_metrics(scores_P2).items()}
    metrics |= pair_source_metrics(
        lambda pairs: pair_metrics(scores_P2[pairs]), sources, source_names, device=scores_P2.device, counted=counted
    )
    return Terms(loss=pair_losses(scores_P2).sum() / global_pairs, metrics=metrics)
