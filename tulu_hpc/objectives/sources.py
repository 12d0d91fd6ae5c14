"""Metrics by source: the data set that a record came from. Shapes: K scored tokens of this rank, P pairs of the pack.

Every micro-batch on every rank reports the sources of the whole run, those it holds nothing of with count 0: so all
ranks agree on the names, and a source that a step has nothing of has no value in that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tulu_hpc.data.packed_batch import Item
from tulu_hpc.objectives.terms import Metric

PAIR_METRICS = ("loss", "rewards/accuracies", "rewards/margins")


def source_names(items: Iterable[Item]) -> list[str]:
    """The sources of a data set in alphabetical order; none when all of it comes from one."""
    names = sorted({item.source for item in items})
    return names if len(names) > 1 else []


def pair_source_metrics(
    measure: Callable[[Tensor], Mapping[str, Tensor]],
    sources: Sequence[str],
    names: Sequence[str],
    *,
    device: torch.device,
    counted: float = 1.0,
    metrics_of: Sequence[str] = PAIR_METRICS,
) -> dict[str, Metric]:
    """`metrics_of` each source as `rewards/accuracies/{source}` and so on, means over its pairs.

    Args:
        measure: indices of pairs -> sums over them by metric name.
        sources: of the pack's pairs.
        names: of the run.
        counted: 0 on the context-parallel ranks that only repeat what the first one counts.
    """
    metrics: dict[str, Metric] = {}
    none = torch.zeros((), device=device)
    for name in names:
        where = [index for index, source in enumerate(sources) if source == name]
        sums = measure(torch.tensor(where, device=device)) if where else {}
        for metric in metrics_of:
            metrics[f"{metric}/{name}"] = (sums.get(metric, none).detach() * counted, len(where) * counted)
    return metrics


def token_source_metrics(
    logprobs_K: Tensor, item_K: Tensor, sources: Sequence[str], names: Sequence[str]
) -> dict[str, Metric]:
    """`loss/{source}`: mean negative log-prob over the trained tokens of each source.

    Args:
        item_K: item of each token.
        sources: of the pack's items.
        names: of the run.
    """
    if not names:
        return {}
    source_I = torch.tensor([names.index(source) for source in sources], dtype=torch.int64, device=logprobs_K.device)
    source_K = source_I[item_K] if sources else item_K
    sums_S = logprobs_K.new_zeros(len(names), dtype=torch.float64)
    counts_S = sums_S.index_add(0, source_K, torch.ones_like(logprobs_K, dtype=torch.float64))
    sums_S = sums_S.index_add(0, source_K, -logprobs_K.detach().double())
    return {f"loss/{name}": (sums_S[index], counts_S[index]) for index, name in enumerate(names)}
