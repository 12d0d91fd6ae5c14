"""How far the policy that sampled is from the one that learns: staleness of samples, importance weights.

Shapes: K scored tokens of a pack, Q sequences.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tulu_hpc.config.rlvr_sections import RlvrSection
from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.objectives.terms import sequence_lengths
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.rollout.engine import Completion


class StaleError(RuntimeError):
    """A sample was drawn by weights that are older than allowed."""


def steps_behind(completion: Completion, versions: Sequence[int]) -> int:
    """Age of the oldest weights that drew a token of a completion, in rollout steps.

    Args:
        versions: of the trainer's weights at the start of the rollout steps so far, ascending, the last that of the
            step that trains; steps that changed nothing have no entry of their own.
    """
    oldest = min((span.version for span in completion.version_spans), default=completion.policy_version)
    return len(versions) - bisect_right(versions, oldest)


def fresh_tokens(completion: Completion, version: int) -> Tensor:
    """1 where weights of this version drew a token, else 0; fp32, one per token."""
    if not completion.version_spans:
        return torch.full((len(completion.token_ids),), float(completion.policy_version == version))
    return torch.cat(
        [torch.full((span.end - span.start,), float(span.version == version)) for span in completion.version_spans]
    )


@dataclass
class Staleness:
    """Ages of the samples of a step."""

    count: int = 0
    total: int = 0
    largest: int = 0

    def add(self, age: int) -> None:
        """Count one sample."""
        self.count += 1
        self.total += age
        self.largest = max(self.largest, age)


def require_fresh(samples: Iterable[tuple[str, Completion]], versions: Sequence[int], most: int) -> Staleness:
    """Ages of named samples, all of which must be at most `most` rollout steps old; `versions` as in `steps_behind`.

    Raises:
        StaleError: naming the sample.
    """
    ages = Staleness()
    for name, completion in samples:
        age = steps_behind(completion, versions)
        if age > most:
            raise StaleError(
                f"sample {name} was drawn by weights {completion.policy_version}, {age} rollout steps before those "
                f"that are trained ({versions[-1]}); at most {most} are allowed"
            )
        ages.add(age)
    return ages


def require_fresh_everywhere(
    groups: Groups, samples: Iterable[tuple[str, Completion]], versions: Sequence[int], most: int
) -> Staleness:
    """`require_fresh` of this replica's samples, which fails on every rank when it fails on one. Collective.

    Raises:
        StaleError: on every rank.
    """
    ages, problem = Staleness(), None
    try:
        ages = require_fresh(samples, versions, most)
    except StaleError as error:
        problem = str(error)
    for found in groups.all_gather_object(problem):
        if found is not None:
            raise StaleError(found)
    return ages


def staleness_metrics(parts: Sequence[Staleness]) -> dict[str, float]:
    """Mean and largest age of the samples of all replicas, in rollout steps."""
    count = sum(part.count for part in parts)
    if count == 0:
        return {}
    return {
        "rollout/staleness": sum(part.total for part in parts) / count,
        "rollout/staleness_max": float(max(part.largest for part in parts)),
    }


@dataclass
class ImportanceStats:
    """Importance weights of a step after their limit; `limited` were truncated or masked."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0
    limited: int = 0


def importance_weights(pack: PackedBatch, rlvr: RlvrSection) -> tuple[Tensor, Tensor]:
    """Weights after their limit and where it applied, by token [K] or by sequence [Q], as the loss has them.

    The log weight is proximal - behaviour of a token, or its sum or mean over the sequence. A column of the whole pack
    is at hand here, so no rank has to be asked.
    """
    if pack.num_targets == 0:
        return torch.empty(0), torch.empty(0, dtype=torch.bool)
    log_K = (pack.per_target["old_logprobs"] - pack.per_target["behaviour_logprobs"]).double()
    if rlvr.importance != "token":
        ids_K = pack.sequence_id_K
        log_Q = log_K.new_zeros(pack.num_sequences).index_add(0, ids_K, log_K)
        log_K = log_Q / sequence_lengths(ids_K, pack.num_sequences) if rlvr.importance == "geometric" else log_Q
    raw = log_K.clamp(-40, 40).exp()  # the kernel's bound: exp and its sums stay finite
    low, cap = rlvr.importance_bounds
    if rlvr.importance_mode == "truncate":
        return raw.clamp(max=cap), raw > cap
    limited = (raw < low) | (raw > cap)
    return raw.masked_fill(limited, 0), limited


def importance_stats(packs: Sequence[PackedBatch], rlvr: RlvrSection) -> ImportanceStats:
    """Of these packs, which have the columns `old_logprobs` and `behaviour_logprobs`; of none without weights."""
    stats = ImportanceStats()
    for pack in packs if rlvr.importance != "none" else ():
        weights, limited = importance_weights(pack, rlvr)
        if weights.numel():
            stats.count += weights.numel()
            stats.total += float(weights.sum())
            stats.largest = max(stats.largest, float(weights.max()))
            stats.limited += int(limited.sum())
    return stats


def importance_metrics(parts: Sequence[ImportanceStats]) -> dict[str, float]:
    """Mean and largest weight, and the share that was truncated or masked; over tokens or sequences as configured."""
    count = sum(part.count for part in parts)
    if count == 0:
        return {}
    return {
        "rollout/importance_mean": math.fsum(part.total for part in parts) / count,
        "rollout/importance_max": max(part.largest for part in parts),
        "rollout/importance_limited": sum(part.limited for part in parts) / count,
    }
