"""Packs of scored groups: a group holds its prompt once. Shapes: K scored tokens of a pack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.loader import pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rlvr_off_policy import steps_behind
from tulu_hpc.stages.rlvr_rollouts import Group
from tulu_hpc.training.runner import Runner, row_multiple


def minibatch_of(number: int, config: RlvrConfig) -> int:
    """The minibatch of the step's prompt `number`; known without communication and the same for any layout."""
    return number * config.rlvr.minibatches // config.rlvr.prompts_per_step


def pack_groups(learner: Learner, groups: Sequence[Group]) -> list[PackedBatch]:
    """Packs of the groups that have an advantage.

    Columns: `advantage`, `answer` (number in the group) and `staleness` (in rollout steps) of an answer,
    `behaviour_logprobs` of a token.
    """
    config = learner.config
    items = [
        Item(
            "group",
            [TokenSequence(torch.tensor(completion.token_ids)) for completion in group.completions],
            prompt=torch.tensor(group.prompt.token_ids),
            per_sequence={
                "advantage": group.advantages,
                "answer": [float(number) for number in range(len(group.completions))],
                "staleness": [float(steps_behind(each, learner.versions)) for each in group.completions],
            },
            per_target={"behaviour_logprobs": [torch.tensor(each.logprobs) for each in group.completions]},
            id=group.prompt.record.id,
            source=group.prompt.record.source,
        )
        for group in groups
        if group.advantages is not None
    ]
    return pack_items(
        items,
        capacity=config.train.pack_rows,
        multiple=row_multiple(learner.run.groups.layout, config.parallel.context_split),
        share=config.train.prefix_sharing,
        pad_id=learner.pad_id,
    )


def add_logprobs(name: str, runner: Runner, packs: Sequence[PackedBatch]) -> None:
    """Add the log-probs of a model as it is now as a column of each pack; collective."""
    for pack, logprobs_K in zip(packs, runner.logprobs(packs), strict=True):
        pack.per_target[name] = logprobs_K.cpu()
