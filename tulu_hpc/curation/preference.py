"""Preference pairs from scored samples: chosen = a best one, rejected = one that scored strictly lower.

The rule of the Tulu 3 paper (section 5.2.1, after Argilla's binarisation of UltraFeedback), with verifiers in the place
of the judge. The code behind the paper draws the rejected response from all others, ties included; here a tie gives no
pair.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class ScoredSample:
    """One answer to a prompt. `finished` tells whether it ended in end-of-text."""

    text: str
    score: float
    finished: bool = True


@dataclass(frozen=True)
class Pair:
    """Chosen and rejected answer with their scores."""

    chosen: ScoredSample
    rejected: ScoredSample


@dataclass
class PreferenceStatistics:
    """Counts over prompts and samples.

    no_pair_equal_scores: prompts whose samples all scored the same (or read the same). no_pair_unfinished: prompts with
    different scores, but without a better answer that ended by itself.
    """

    prompts: int = 0
    pairs: int = 0
    no_pair_equal_scores: int = 0
    no_pair_unfinished: int = 0
    samples: int = 0
    finished: int = 0
    score_sum: float = 0.0
    chosen_score_sum: float = 0.0
    rejected_score_sum: float = 0.0
    pairs_by_source: dict[str, int] = field(default_factory=dict)
    prompts_by_source: dict[str, int] = field(default_factory=dict)

    def add(self, samples: Sequence[ScoredSample], pair: Pair | None, source: str) -> None:
        """Count one prompt."""
        self.prompts += 1
        self.samples += len(samples)
        self.finished += sum(sample.finished for sample in samples)
        self.score_sum += sum(worth(sample) for sample in samples)
        self.prompts_by_source[source] = self.prompts_by_source.get(source, 0) + 1
        if pair is None:
            if len({sample.score for sample in samples}) > len({worth(sample) for sample in samples}):
                self.no_pair_unfinished += 1
            else:
                self.no_pair_equal_scores += 1
            return
        self.pairs += 1
        self.chosen_score_sum += pair.chosen.score
        self.rejected_score_sum += worth(pair.rejected)
        self.pairs_by_source[source] = self.pairs_by_source.get(source, 0) + 1

    def summary(self) -> dict[str, object]:
        """The counts with means, for a JSON file."""
        counts = asdict(self)
        sums = {name: counts.pop(f"{name}_sum") for name in ("score", "chosen_score", "rejected_score")}
        return {
            **counts,
            "pair_share": _ratio(self.pairs, self.prompts),
            "finished_share": _ratio(self.finished, self.samples),
            "mean_score": _ratio(sums["score"], self.samples),
            "mean_chosen_score": _ratio(sums["chosen_score"], self.pairs),
            "mean_rejected_score": _ratio(sums["rejected_score"], self.pairs),
        }


def binarise(samples: Sequence[ScoredSample], *, seed: int) -> Pair | None:
    """The pair of one prompt, or None if no two samples differ in what they are worth.

    An unfinished sample (cut off at the token limit) is worth 0 whatever its score, as in RLVR, and is never chosen;
    blank samples are left out. Among equally good candidates, and among the worse ones, the seed decides.
    """
    usable = [sample for sample in samples if sample.text.strip()]
    best = max((sample.score for sample in usable if sample.finished), default=0.0)
    good = [sample for sample in usable if sample.finished and sample.score == best]
    worse = [sample for sample in usable if worth(sample) < best]
    if not good or not worse:
        return None
    generator = random.Random(seed)
    chosen, rejected = generator.choice(good), generator.choice(worse)
    return Pair(chosen, rejected) if chosen.text != rejected.text else None


def worth(sample: ScoredSample) -> float:
    """The score that counts: 0 for an answer that was cut off."""
    return sample.score if sample.finished else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
