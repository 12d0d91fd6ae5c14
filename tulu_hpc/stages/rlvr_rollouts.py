"""Prompts of a rollout step, their answers, rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.datasets import Prompt
from tulu_hpc.data.records import content_id
from tulu_hpc.objectives.advantages import group_advantages
from tulu_hpc.rollout.engine import Completion, Request
from tulu_hpc.rollout.sampling import derive_seed
from tulu_hpc.rollout.texts import completion_text, ended_itself
from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rollouts import verifier_record, verify_in_replica


@dataclass(frozen=True)
class Group:
    """The answers to one prompt of a step; `number` is the prompt's place in the step."""

    number: int
    prompt: Prompt
    completions: list[Completion]
    rewards: list[float]
    advantages: list[float] | None  # None: all rewards are equal, or ppo


def prompts_of_step(prompts: Sequence[Prompt], config: RlvrConfig, step: int) -> list[Prompt]:
    """The prompts of rollout step `step` (from 1): slices of an endless stream of epochs, each a seeded permutation."""
    count, total = config.rlvr.prompts_per_step, len(prompts)
    orders: dict[int, list[int]] = {}
    chosen: list[Prompt] = []
    for position in range((step - 1) * count, step * count):
        epoch, offset = divmod(position, total)
        if epoch not in orders:
            if config.data.shuffle:
                generator = torch.Generator().manual_seed(derive_seed("prompts", config.run.seed, epoch) >> 1)
                orders[epoch] = torch.randperm(total, generator=generator).tolist()
            else:
                orders[epoch] = list(range(total))
        chosen.append(prompts[orders[epoch][offset]])
    return chosen


def generate(learner: Learner, step: int) -> list[tuple[int, Prompt, list[Completion]]]:
    """Answers to this replica's share of the step's prompts: (number of the prompt, prompt, answers)."""
    config, groups = learner.config, learner.run.groups
    numbered = list(enumerate(prompts_of_step(learner.prompts, config, step)))
    mine = numbered[groups.dp_rank :: groups.dp_size]
    count = config.rlvr.samples_per_prompt
    requests = [
        Request(prompt.token_ids, learner.sampling, derive_seed("rollout", config.run.seed, step, number, sample))
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


def score_rollouts(learner: Learner, rollouts: Sequence[tuple[int, Prompt, list[Completion]]]) -> list[Group]:
    """Rewards and advantages: verification_reward x score, or no_eos_penalty for an answer without end-of-text."""
    rlvr = learner.config.rlvr
    tasks = [
        (verifier_record(prompt.record), completion_text(learner.tokenizer, completion))
        for _, prompt, completions in rollouts
        for completion in completions
    ]
    verdicts = iter(verify_in_replica(learner.run.groups, learner.pool, tasks))
    scored = []
    for number, prompt, completions in rollouts:
        rewards = []
        for completion in completions:
            score = next(verdicts).score
            rewards.append(rlvr.verification_reward * score if ended_itself(completion) else rlvr.no_eos_penalty)
        advantages = None if rlvr.kind == "ppo" else group_advantages(rewards, rlvr.advantage)
        scored.append(Group(number, prompt, completions, rewards, advantages))
    return scored


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Identity of the prompts and their order."""
    return content_id([prompt.record.id for prompt in prompts])
