"""The groups of a step: prompts from an endless stream, answered and scored; dynamic sampling asks for more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rlvr_metrics import Clock
from tulu_hpc.stages.rlvr_rollouts import Group, generate, is_decided, score_rollouts


class SamplingError(RuntimeError):
    """Dynamic sampling did not fill a step."""


@dataclass(frozen=True)
class Wanted:
    """Places of a step to be filled: the place `numbers[i]` gets the prompt at `position + i` of the stream."""

    numbers: list[int]
    position: int

    @property
    def end(self) -> int:
        """Position of the stream after these prompts."""
        return self.position + len(self.numbers)


def next_wanted(wanted: Wanted, decided: Mapping[int, bool]) -> Wanted:
    """What dynamic sampling asks for after `wanted` was answered and scored; without places: nothing.

    A place whose group is not decided (all verified rewards are equal) gets the next prompt of the stream, in the order
    of the places. A pure function of what all replicas together have scored, so it does not depend on the layout.

    Args:
        decided: by place, whether its group has two different verified rewards.
    """
    missing = sorted(number for number in wanted.numbers if not decided[number])
    return Wanted(missing, wanted.end)


# The scored groups of this replica for the places of a step, in an extra round of dynamic sampling (0: the first).
Answer: TypeAlias = Callable[[Wanted, int], list[Group]]


@dataclass
class Sampled:
    """The groups of this replica.

    Attributes:
        groups: that the step learns from. dropped: that were replaced.
        extra_rounds: how often missing groups were asked for again. missing: places that stayed without a group.
        position: of the stream of prompts after this step.
    """

    groups: list[Group]
    dropped: list[Group] = field(default_factory=list)
    extra_rounds: int = 0
    missing: int = 0
    position: int = 0


def answer_now(learner: Learner, step: int, clock: Clock) -> Answer:
    """Groups that are generated and verified when they are asked for."""

    def answer(wanted: Wanted, extra: int) -> list[Group]:
        rollouts = generate(learner, step, wanted.numbers, wanted.position, extra)
        clock.lap("rollout")
        scored = score_rollouts(learner, rollouts)
        clock.lap("verify")
        return scored

    return answer


def sample_groups(learner: Learner, step: int, answer: Answer) -> Sampled:
    """Answer and score the prompts of a step from `learner.position` of the stream on; collective.

    Raises:
        SamplingError: dynamic sampling has used up its rounds, and rlvr.incomplete_step is `error`.
    """
    rlvr = learner.config.rlvr
    wanted = Wanted(list(range(rlvr.prompts_per_step)), learner.position)
    found = Sampled([])
    for extra in range(rlvr.max_extra_rounds + 1):
        scored = answer(wanted, extra)
        found.extra_rounds, found.position = extra, wanted.end
        if not rlvr.dynamic_sampling:
            found.groups = scored
            return found
        found.groups += [group for group in scored if is_decided(group)]
        found.dropped += [group for group in scored if not is_decided(group)]
        wanted = next_wanted(wanted, _decided(learner, scored))
        if not wanted.numbers:
            return found
    found.missing = len(wanted.numbers)
    if rlvr.incomplete_step == "error":
        raise SamplingError(
            f"rlvr step {step}: {found.missing} of {rlvr.prompts_per_step} prompts are missing after "
            f"rlvr.max_extra_rounds = {rlvr.max_extra_rounds}: {found.position - learner.position} prompts were asked, "
            "and too many have answers with equal rewards, so they are too easy or too hard; give other prompts, more "
            "rlvr.samples_per_prompt, or rlvr.incomplete_step = train"
        )
    return found


def _decided(learner: Learner, scored: Sequence[Group]) -> dict[int, bool]:
    """Of the groups of all replicas, by place; the same on every process."""
    shares = learner.run.groups.all_gather_object({group.number: is_decided(group) for group in scored})
    return {number: decided for share in shares for number, decided in share.items()}


def sampling_metrics(learner: Learner, found: Sampled) -> dict[str, float]:
    """Of dynamic sampling: further rounds, and prompts asked for and missing, over those that the step wants."""
    if not learner.config.rlvr.dynamic_sampling:
        return {}
    return {
        "rollout/extra_rounds": float(found.extra_rounds),
        "rollout/prompts_asked": float(found.position - learner.position),
        "rollout/prompts_missing": float(found.missing),
    }
