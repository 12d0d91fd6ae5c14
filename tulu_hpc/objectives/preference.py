"""Direct preference optimisation on packs whose pairs hold their prompt once.

Shapes: K scored tokens of this rank, Q sequences of the pack, P pairs of the pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tulu_hpc.kernels import preference_loss
from tulu_hpc.objectives.sources import PAIR_METRICS, pair_source_metrics
from tulu_hpc.objectives.terms import Metric, Terms, sequence_sums

_NAMES = {"loss/sft": "sft_loss"}
_UNPAIRED_METRICS = tuple(name for name in PAIR_METRICS if name != "rewards/margins")


def labelled_pairs(label_Q: Tensor) -> Tensor:
    """[Q, 2] for kto: (q, -1) for a desirable sequence (label 1), (-1, q) for an undesirable one (0)."""
    q = torch.arange(label_Q.numel(), device=label_Q.device)
    desirable = label_Q > 0.5
    return torch.stack((q.where(desirable, -1), q.where(~desirable, -1)), dim=1)


def preference_terms(
    logprobs_K: Tensor,
    *,
    sequence_id_K: Tensor,
    pairs_P2: Tensor,
    reference_sums_Q: Tensor,
    lengths_Q: Tensor,
    global_pairs: int,
    kind: str,
    beta: float,
    weights_Q: Tensor | None = None,
    alignment_K: Tensor | None = None,
    unpaired: bool = False,
    estimated_kl: float | None = None,
    cp_group: ProcessGroup | None = None,
    sources: Sequence[str] = (),
    source_names: Sequence[str] = (),
    **options: Any,
) -> Terms:
    """Loss of the pack's pairs over the pairs of the global batch; kinds and formulas: `kernels.preference_loss`.

    Args:
        logprobs_K: policy, fp32; a context-parallel rank has its own tokens only.
        sequence_id_K: sequence of each of these tokens.
        pairs_P2: sequence ids of (chosen, rejected); of `labelled_pairs`, one of them is -1.
        reference_sums_Q: reference log-prob of each sequence, fp32; not read by simpo and orpo.
        lengths_Q: scored tokens of each sequence of the whole pack.
        global_pairs: pairs of the global batch, all ranks.
        weights_Q: weight of the whole loss of each pair, at both of its sequences. The loss stays a mean over pairs.
        alignment_K: for wpo, log sum p^2 of these tokens' distributions.
        unpaired: the pairs have one side each; metrics of a side are then means over those that have it, and there are
            no margins.
        sources, source_names: of the pack's pairs, and of the whole run (none: no metrics by source).
        estimated_kl: baseline of kto from this step's answers, reported as `kl`; None: it is an option, or 0.
        options: further arguments of `kernels.preference_loss` (label_smoothing, gamma, sft_weight, ...).

    Metrics (means over pairs): `loss`, `rewards/{chosen,rejected,margins,accuracies}` (a reward is beta times the
    score: the log-ratio, or for the kinds on means that of the per-token means), `logps/{chosen,rejected}` (sums over
    a sequence), `lengths/{chosen,rejected}`, where they apply `sft_loss` and `weights`, and those of
    `sources.PAIR_METRICS` by source. Accuracy of a single side: whether its reward has the sign of its label.

    Raises:
        ValueError: no pair in the global batch; options that do not fit the kind.
    """
    if global_pairs < 1:
        raise ValueError(f"{kind} loss: the global batch has {global_pairs} pairs")
    # Only sums over ranks have to be taken before the kernel; it takes its own in the same launch.
    shared = cp_group is not None and cp_group.size() > 1
    sums_Q = sequence_sums(logprobs_K, sequence_id_K, reference_sums_Q.numel(), cp_group) if shared else None
    if alignment_K is not None:
        options["alignment_sums_Q"] = sequence_sums(
            alignment_K.detach(), sequence_id_K, reference_sums_Q.numel(), cp_group
        )
    if estimated_kl is not None:
        options["kl"] = estimated_kl
    weights_P = None if weights_Q is None else weights_Q[pairs_P2.amax(1)]
    out = preference_loss(
        logprobs_K,
        sequence_id_K,
        reference_sums_Q,
        pairs_P2,
        kind=kind,
        beta=beta,
        policy_sums_Q=sums_Q,
        lengths_Q=lengths_Q,
        weights_P=weights_P,
        **options,
    )
    # Every context-parallel rank has the same pairs; the first one counts them.
    counted = 1.0 if cp_group is None or cp_group.rank() == 0 else 0.0
    pairs = pairs_P2.shape[0] * counted
    sides = {side: out.metrics[f"counts/{side}"] * counted for side in ("chosen", "rejected")}
    # `loss/...` is the room of the sources: the kernel's `loss/sft` would be that of a source named sft.
    sums = {"loss": out.loss.detach(), **{_NAMES.get(name, name): value for name, value in out.metrics.items()}}
    shown: dict[str, Metric] = {
        name: (value * counted, sides.get(name.rpartition("/")[2], pairs) if unpaired else pairs)
        for name, value in sums.items()
        if not name.startswith("counts/") and not (unpaired and name == "rewards/margins")
    }
    if estimated_kl is not None:
        shown["kl"] = (out.loss.new_tensor(estimated_kl * pairs), pairs)
    if not source_names:
        return Terms(loss=out.loss / global_pairs, metrics=shown)

    @torch.no_grad()
    def measure(pairs: Tensor) -> Mapping[str, Tensor]:
        part = preference_loss(
            logprobs_K.detach(),
            sequence_id_K,
            reference_sums_Q,
            pairs_P2[pairs],
            kind=kind,
            beta=beta,
            policy_sums_Q=None if sums_Q is None else sums_Q.detach(),
            lengths_Q=lengths_Q,
            weights_P=None if weights_P is None else weights_P[pairs],
            **options,
        )
        return {"loss": part.loss, **part.metrics}

    by_source = pair_source_metrics(
        measure,
        sources,
        source_names,
        device=logprobs_K.device,
        counted=counted,
        metrics_of=_UNPAIRED_METRICS if unpaired else PAIR_METRICS,
    )
    return Terms(loss=out.loss / global_pairs, metrics={**shown, **by_source})
