"""Difference of log-probs between rollout engine and trainer, by place in the answer and by its length.

Shapes: K scored tokens of a pack (or of a rank's part of it), Q sequences, B buckets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.objectives.terms import own_targets, sequence_lengths
from tulu_hpc.parallel.context import RankBatch

# Lower ends of the buckets of positions (from 0) and lengths, in tokens.
_EDGES = (16, 64, 256, 1024, 4096, 16384)
BUCKETS = tuple(
    f"{low}+" if high is None else f"{low}-{high - 1}" for low, high in zip((0, *_EDGES), (*_EDGES, None), strict=True)
)


class MismatchError(RuntimeError):
    """Rollout engine and trainer give different log-probs for the same tokens and weights."""


class Places(NamedTuple):
    """Where the scored tokens stand in their answers.

    Attributes:
        position_K: int64, from 0. length_K: int64, of the answer. token_K: int64 ids.
        sequence_id_K: int64, row of `samples`.
        fresh_K: whether the weights that are trained drew the token; others are not compared.
        samples: id of each answer of the pack, `RECORD#NUMBER`.
    """

    position_K: Tensor
    length_K: Tensor
    token_K: Tensor
    sequence_id_K: Tensor
    fresh_K: Tensor
    samples: list[str]

    def of_rank(self, batch: RankBatch) -> Places:
        """Those of this context-parallel rank's targets."""
        return self.each(lambda column_K: own_targets(column_K, batch))

    def fresh(self) -> Places:
        """Those that are compared."""
        return self.each(lambda column_K: column_K[self.fresh_K])

    def each(self, read: Callable[[Tensor], Tensor]) -> Places:
        """Every column read the same way."""
        return Places(
            position_K=read(self.position_K),
            length_K=read(self.length_K),
            token_K=read(self.token_K),
            sequence_id_K=read(self.sequence_id_K),
            fresh_K=read(self.fresh_K),
            samples=self.samples,
        )


def places(pack: PackedBatch) -> Places:
    """Of all targets of a pack of groups, whose answers have the column `answer`, and their tokens `fresh`."""
    ids_K = pack.sequence_id_K
    lengths_Q = sequence_lengths(ids_K, pack.num_sequences).long()
    first_Q = lengths_Q.cumsum(0) - lengths_Q
    position_K = torch.arange(pack.num_targets, device=ids_K.device) - first_Q[ids_K]
    empty = torch.zeros(0, device=ids_K.device)  # a pack of nothing has no columns
    numbers = pack.per_sequence.get("answer", empty).tolist()
    items = pack.per_sequence["item"].tolist()
    samples = [f"{pack.item_ids[item]}#{number:.0f}" for item, number in zip(items, numbers, strict=True)]
    fresh_K = pack.per_target.get("fresh", empty) != 0
    return Places(position_K, lengths_Q[ids_K], pack.target_K, ids_K, fresh_K, samples)


class Worst(NamedTuple):
    """The token with the largest difference."""

    difference: float
    sample: str
    position: int
    length: int
    token: int
    trainer: float
    engine: float

    def __str__(self) -> str:
        return (
            f"worst in sample {self.sample} at position {self.position} of {self.length}: token {self.token}, "
            f"trainer {self.trainer:.6g}, engine {self.engine:.6g}"
        )


@dataclass
class Buckets:
    """Count, sum and maximum of |d| for each of `BUCKETS`."""

    count: list[float] = field(default_factory=lambda: [0.0] * len(BUCKETS))
    total: list[float] = field(default_factory=lambda: [0.0] * len(BUCKETS))
    largest: list[float] = field(default_factory=lambda: [0.0] * len(BUCKETS))

    def add(self, difference_K: Tensor, place_K: Tensor) -> None:
        """Count tokens in the buckets of `place_K`."""
        edges = torch.tensor(_EDGES, device=place_K.device)
        bucket_K = torch.bucketize(place_K, edges, right=True)
        zero_B = difference_K.new_zeros(len(BUCKETS))
        count_B = zero_B.index_add(0, bucket_K, torch.ones_like(difference_K))
        total_B = zero_B.index_add(0, bucket_K, difference_K)
        largest_B = zero_B.scatter_reduce(0, bucket_K, difference_K, "amax")
        counts, totals, largest = torch.stack((count_B, total_B, largest_B)).tolist()
        self.count = [a + b for a, b in zip(self.count, counts, strict=True)]
        self.total = [a + b for a, b in zip(self.total, totals, strict=True)]
        self.largest = [_larger(a, b) for a, b in zip(largest, self.largest, strict=True)]


@dataclass
class Mismatch:
    """Sums over tokens, with d = trainer - engine of their log-probs; those of buckets are [B] lists."""

    count: int = 0
    total: float = 0.0  # of |d|
    largest: float = 0.0  # |d|, NaN if any is
    multiplied: float = 0.0  # sum of exp(|d|)
    divergence: float = 0.0  # sum of exp(d) - 1 - d
    by_position: Buckets = field(default_factory=Buckets)
    by_length: Buckets = field(default_factory=Buckets)
    worst: Worst | None = None

    def add(self, trainer_K: Tensor, engine_K: Tensor, where: Places | None = None) -> None:
        """Count the tokens of one pack (or of this rank's part of it), those that older weights drew aside."""
        if where is not None:
            trainer_K, engine_K, where = trainer_K[where.fresh_K], engine_K[where.fresh_K], where.fresh()
        if trainer_K.numel() == 0:
            return
        signed_K = trainer_K.double() - engine_K.double()
        difference_K = signed_K.abs()
        self.count += difference_K.numel()
        divergence = (signed_K.expm1() - signed_K).sum()
        values = torch.stack((difference_K.sum(), difference_K.max(), difference_K.exp().sum(), divergence)).tolist()
        self.total += values[0]
        self.multiplied += values[2]
        self.divergence += values[3]
        if where is not None and _worse(values[1], self.worst.difference if self.worst else -1.0):
            self.worst = _worst(trainer_K, engine_K, difference_K, where)
        self.largest = _larger(values[1], self.largest)
        if where is not None:
            self.by_position.add(difference_K, where.position_K)
            self.by_length.add(difference_K, where.length_K)


def add_up(parts: Sequence[Mismatch]) -> Mismatch:
    """The parts of all ranks as one."""
    whole = Mismatch()
    for part in parts:
        whole.count += part.count
        whole.total += part.total
        whole.multiplied += part.multiplied
        whole.divergence += part.divergence
        whole.largest = _larger(part.largest, whole.largest)
        for mine, other in ((whole.by_position, part.by_position), (whole.by_length, part.by_length)):
            mine.count = [a + b for a, b in zip(mine.count, other.count, strict=True)]
            mine.total = [a + b for a, b in zip(mine.total, other.total, strict=True)]
            mine.largest = [_larger(a, b) for a, b in zip(other.largest, mine.largest, strict=True)]
        if part.worst and (whole.worst is None or _worse(part.worst.difference, whole.worst.difference)):
            whole.worst = part.worst
    return whole


def breach(parts: Sequence[Mismatch], most: float | None, most_mult_prob: float) -> str | None:
    """What the differences exceed and where they are largest, or None. A NaN exceeds everything."""
    whole = add_up(parts)
    if whole.count == 0:
        return None
    mult_prob = whole.multiplied / whole.count
    if most is not None and not whole.largest <= most:
        return f"by up to {whole.largest:.3g} (limit {most:g}) over {whole.count} tokens{_where(whole)}"
    if not mult_prob <= most_mult_prob:
        return (
            f"by so much that exp(|difference|) is {mult_prob:.4g} on average (limit {most_mult_prob:g}) over "
            f"{whole.count} tokens{_where(whole)}"
        )
    return None


def _where(whole: Mismatch) -> str:
    if whole.worst is None:
        return ""
    parts = [f"; {whole.worst}"]
    for name, buckets in (("positions", whole.by_position), ("lengths", whole.by_length)):
        means = [total / count if count else -1.0 for total, count in zip(buckets.total, buckets.count, strict=True)]
        index = max(range(len(means)), key=lambda i: math.inf if math.isnan(means[i]) else means[i])
        parts.append(f"worst {name} {BUCKETS[index]} (mean {means[index]:.3g}, max {buckets.largest[index]:.3g})")
    return ", ".join(parts)


def mismatch_metrics(parts: Sequence[Mismatch]) -> dict[str, float]:
    """Of |d|: mean, largest, and mean of exp(|d|) (1 for perfect agreement); `mismatch_kl` is the k3 estimate of
    KL(engine || trainer) (http://joschu.net/blog/kl-approx.html). Mean and largest also by position and by length."""
    whole = add_up(parts)
    if whole.count == 0:
        return {}
    metrics = {
        "rollout/logprob_error_mean": whole.total / whole.count,
        "rollout/logprob_error_max": whole.largest,
        "rollout/token_mult_prob_error": whole.multiplied / whole.count,
        "rollout/mismatch_kl": whole.divergence / whole.count,
    }
    for name, buckets in (("position", whole.by_position), ("length", whole.by_length)):
        for bucket, count, total, largest in zip(BUCKETS, buckets.count, buckets.total, buckets.largest, strict=True):
            if count:
                metrics[f"rollout/logprob_error_mean/{name}_{bucket}"] = total / count
                metrics[f"rollout/logprob_error_max/{name}_{bucket}"] = largest
    return metrics


def _worse(one: float, other: float) -> bool:
    return not math.isnan(other) and (math.isnan(one) or one > other)


def _larger(one: float, other: float) -> float:
    """max() that keeps a NaN, the worst mismatch of all."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _worst(trainer_K: Tensor, engine_K: Tensor, difference_K: Tensor, where: Places) -> Worst:
    index = int(difference_K.nan_to_num(nan=math.inf).argmax())
    return Worst(
        float(difference_K[index]),
        where.samples[int(where.sequence_id_K[index])],
        int(where.position_K[index]),
        int(where.length_K[index]),
        int(where.token_K[index]),
        float(trainer_K[index]),
        float(engine_K[index]),
    )
