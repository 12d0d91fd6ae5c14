"""Prompts of a rollout step, their answers, rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.datasets import Prompt
from tulu_hpc.data.records import content_id
from tulu_hpc.objectives.advantages import group_advantages, overlong_share
from tulu_hpc.rollout.engine import Completion, Request
from tulu_hpc.rollout.sampling import derive_seed
from tulu_hpc.rollout.texts import completion_text, ended_itself
from tulu_hpc.stages.rlvr_buffer import SampleKey
from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rollouts import verifier_record, verify_in_replica


@dataclass(frozen=True)
class Group:
    """The answers to one prompt of a step; `number` is the prompt's place in the step."""

    number: int
    prompt: Prompt
    completions: list[Completion]
    verified: list[float]  # rewards of the verdicts alone
    rewards: list[float]  # with the penalty for length
    advantages: list[float] | None  # None: all rewards are equal, or ppo


def is_decided(group: Group) -> bool:
    """Whether the verdicts prefer some answers to others (DAPO's 0 < correct < G, arXiv 2503.14476 eq. 11)."""
    return min(group.verified) < max(group.verified)


def prompts_from(prompts: Sequence[Prompt], config: RlvrConfig, position: int, count: int) -> list[Prompt]:
    """`count` prompts from `position` of an endless stream of epochs on, each epoch a seeded permutation of all."""
    total = len(prompts)
    orders: dict[int, list[int]] = {}
    chosen: list[Prompt] = []
    for place in range(position, position + count):
        epoch, offset = divmod(place, total)
        if epoch not in orders:
            if config.data.shuffle:
                generator = torch.Generator().manual_seed(derive_seed("prompts", config.run.seed, epoch) >> 1)
                orders[epoch] = torch.randperm(total, generator=generator).tolist()
            else:
                orders[epoch] = list(range(total))
        chosen.append(prompts[orders[epoch][offset]])
    return chosen


def generate(
    learner: Learner, step: int, numbers: Sequence[int], position: int, extra_round: int = 0
) -> list[tuple[int, Prompt, list[Completion]]]:
    """This replica's share of answers to the prompts from `position` of the stream on: (place in the step, prompt,
    answers).

    Args:
        numbers: places in the step, one for each prompt.
        extra_round: of dynamic sampling; a place is then not sampled with the random numbers of its last prompt again.
    """
    mine = share_of_prompts(learner, numbers, position)
    count = learner.config.rlvr.samples_per_prompt
    requests = [
        request_of(learner, prompt, step, number, sample, extra_round)
        for number, prompt in mine
        for sample in range(count)
    ]
    learner.trainer.synchronise_parameters()
    completions = learner.engine.generate_batch(requests)
    learner.engine.release()  # the cache's memory is the trainer's until the next step
    return [
        (number, prompt, completions[index * count : (index + 1) * count])
        for index, (number, prompt) in enumerate(mine)
    ]


def share_of_prompts(learner: Learner, numbers: Sequence[int], position: int) -> list[tuple[int, Prompt]]:
    """This replica's share of the prompts from `position` of the stream on, with their places in the step."""
    groups = learner.run.groups
    chosen = prompts_from(learner.prompts, learner.config, position, len(numbers))
    return list(zip(numbers, chosen, strict=True))[groups.dp_rank :: groups.dp_size]


def request_of(learner: Learner, prompt: Prompt, step: int, number: int, sample: int, extra_round: int) -> Request:
    """The request for one sample, with random numbers of its own."""
    again = [extra_round] if extra_round else []
    seed = derive_seed("rollout", learner.config.run.seed, step, number, sample, *again)
    name = str(SampleKey(step, extra_round, number, sample))
    return Request(prompt.token_ids, learner.sampling, seed, name)


def score_rollouts(learner: Learner, rollouts: Sequence[tuple[int, Prompt, list[Completion]]]) -> list[Group]:
    """Groups of this replica, verified; on every rank of it."""
    tasks = [
        (verifier_record(prompt.record), completion_text(learner.tokenizer, completion))
        for _, prompt, completions in rollouts
        for completion in completions
    ]
    scores = iter([verdict.score for verdict in verify_in_replica(learner.run.groups, learner.pool, tasks)])
    return [
        make_group(learner.config, number, prompt, completions, [next(scores) for _ in completions])
        for number, prompt, completions in rollouts
    ]


def make_group(
    config: RlvrConfig, number: int, prompt: Prompt, completions: list[Completion], scores: Sequence[float]
) -> Group:
    """Rewards and advantages: verification_reward x score, or no_eos_penalty for an answer without end-of-text, less
    the penalty for length."""
    rlvr = config.rlvr
    verified = [
        rlvr.verification_reward * score if ended_itself(completion) else rlvr.no_eos_penalty
        for completion, score in zip(completions, scores, strict=True)
    ]
    rewards = shaped_rewards(verified, completions, config)
    advantages = None if rlvr.kind == "ppo" else group_advantages(rewards, rlvr.advantage)
    return Group(number, prompt, completions, verified, rewards, advantages)


def shaped_rewards(verified: Sequence[float], completions: Sequence[Completion], config: RlvrConfig) -> list[float]:
    """Rewards less overlong_penalty times the share that each answer's length gets."""
    rlvr, longest = config.rlvr, config.rollout.max_new_tokens
    penalty = rlvr.verification_reward if rlvr.overlong_penalty is None else rlvr.overlong_penalty
    return [
        reward - penalty * overlong_share(len(completion.token_ids), longest, rlvr.overlong_buffer)
        for reward, completion in zip(verified, completions, strict=True)
    ]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Identity of the prompts and their order."""
    return content_id([prompt.record.id for prompt in prompts])
