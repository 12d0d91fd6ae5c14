"""Our GRPO training phase as a contestant: rlvr's packs, policy loss and optimizer step on given samples.

What generation would bring beside the samples, their log-probs, is computed here by a pass of its own, because TRL
computes it too.
"""

from __future__ import annotations

import torch
from common import UPDATES_PER_BATCH, Spec, answers_of, read_rows, rewards_of
from our_side import as_padded, configuration, required_pack_rows
from parts import use_full_logits
from torch import Tensor
from turns import Turn, current_rss

from tulu_hpc.config.schema import SftConfig
from tulu_hpc.data.loader import StepData
from tulu_hpc.data.packed_batch import Item, TokenSequence
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.advantages import group_advantages
from tulu_hpc.objectives.policy import policy_terms
from tulu_hpc.objectives.terms import Terms, own_targets, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.stages import training_run
from tulu_hpc.training.normalisation import global_counts
from tulu_hpc.training.step import train_step


def grpo_worker(spec: Spec, turn: Turn) -> None:
    """A batch of samples every `UPDATES_PER_BATCH` steps; its log-probs before the first of them."""
    items = []
    for index, row in enumerate(read_rows(spec)):
        advantages = group_advantages(rewards_of(row), "centered")
        assert advantages is not None, "rewards_of never gives equal rewards"
        items.append(
            Item(
                "group",
                [TokenSequence(torch.tensor(answer)) for answer in answers_of(row)],
                prompt=torch.tensor(row["prompt"]),
                per_sequence={"advantage": advantages},
                id=str(index),
            )
        )
    # The loader, optimizer and step are the same for all stages; rlvr's configuration would also want verifiers.
    run = training_run.open_run(SftConfig(**configuration(spec, required_pack_rows(spec, items))), "sft")
    trainer = training_run.make_trainer(run, total_steps=spec.steps)
    if spec.options.get("head") == "full":
        use_full_logits()
    loader = training_run.make_loader(run, as_padded(spec, items), pad_id=0)
    turn.report(rss=current_rss())
    data: StepData | None = None
    for step in range(spec.steps):
        turn.wait()
        if step % UPDATES_PER_BATCH == 0:
            data = loader.next_step()
            for pack, logprobs_K in zip(data.packs, trainer.runner.logprobs(data.packs), strict=True):
                pack.per_target["behaviour_logprobs"] = logprobs_K
        assert data is not None
        count = global_counts(data.packs, run.groups).targets
        logprob_sum = 0.0

        def loss(output: TokenLogprobs, batch: RankBatch, count: int = count) -> Terms:
            nonlocal logprob_sum
            pack = batch.batch
            sequence_id_K: Tensor = own_targets(pack.sequence_id_K, batch)
            logprob_sum += float(output.logprobs_K.detach().sum())
            return policy_terms(
                output.logprobs_K,
                behaviour_logprobs_K=own_targets(pack.per_target["behaviour_logprobs"], batch),
                advantages_K=pack.per_sequence["advantage"][sequence_id_K],
                sequence_id_K=sequence_id_K,
                lengths_Q=sequence_lengths(pack.sequence_id_K, pack.num_sequences),
                normalisation="token_mean",
                global_count=count,
                clip_low=0.2,
                clip_high=0.2,
            )

        result = train_step(trainer, data.packs, loss)
        turn.report(loss=result.loss, rows=result.rows, tokens=result.targets, logprob=logprob_sum / count)
