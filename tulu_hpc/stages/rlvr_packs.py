"""Packs of scored groups: a group holds its prompt once. Shapes: K scored tokens of a pack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.loader import pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.parallel.layout import Layout
from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rlvr_off_policy import fresh_tokens, steps_behind
from tulu_hpc.stages.rlvr_rollouts import Group
from tulu_hpc.training.runner import Runner, row_multiple


def minibatch_of(number: int, config: RlvrConfig) -> int:
    """The minibatch of the step's prompt `number`; known without communication and the same for any layout."""
    return number * config.rlvr.minibatches // config.rlvr.prompts_per_step


def pack_groups(learner: Learner, groups: Sequence[Group]) -> list[PackedBatch]:
    """Packs of the groups that carry a gradient.

    Columns of an answer: `reward`, `sample` (its number in the step), `answer` (in the group), `staleness` (in rollout
    steps) and, where answers are compared with each other, `advantage`; of a token: `behaviour_logprobs` and
    `fresh` (1 where the weights that are trained drew it, else 0).
    """
    config = learner.config
    items = [
        Item(
            "group",
            [TokenSequence(torch.tensor(completion.token_ids)) for completion in group.completions],
            prompt=torch.tensor(group.prompt.token_ids),
            per_sequence={
                "reward": group.rewards,
                "sample": sample_numbers(group, config),
                "answer": [float(number) for number in range(len(group.completions))],
                "staleness": [float(steps_behind(each, learner.versions)) for each in group.completions],
                **({} if group.advantages is None else {"advantage": group.advantages}),
            },
            per_target={
                "behaviour_logprobs": [torch.tensor(each.logprobs) for each in group.completions],
                "fresh": [fresh_tokens(each, learner.versions[-1]) for each in group.completions],
            },
            id=group.prompt.record.id,
            source=group.prompt.record.source,
        )
        for group in groups
        if group.advantages is not None or config.rlvr.kind == "ppo"
    ]
    return pack_for(items, config, learner.run.groups.layout, config.parallel, learner.pad_id)


def pack_for(
    items: Sequence[Item], config: RlvrConfig, layout: Layout, parallel: ParallelSection, pad_id: int
) -> list[PackedBatch]:
    """Packs for a model of this layout."""
    return pack_items(
        items,
        capacity=config.train.pack_rows,
        multiple=row_multiple(layout, parallel.context_split),
        share=config.train.prefix_sharing,
        pad_id=pad_id,
    )


def sample_numbers(group: Group, config: RlvrConfig) -> list[float]:
    """Numbers of the group's answers among those of the step; exact in a column of fp32 below 2^24."""
    first = group.number * config.rlvr.samples_per_prompt
    return [float(first + index) for index in range(len(group.completions))]


def add_logprobs(name: str, runner: Runner, packs: Sequence[PackedBatch]) -> None:
    """Add the log-probs of a model as it is now as a column of each pack; collective."""
    for pack, logprobs_K in zip(packs, runner.logprobs(packs), strict=True):
        pack.per_target[name] = logprobs_K.cpu()
