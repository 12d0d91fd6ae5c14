"""One GRPO step: prompts -> answers -> verdicts -> rewards -> advantages -> packs (a group holds its prompt once) ->
reference log-probs -> updates.

Shapes: K scored tokens of a pack, Q sequences of a pack, G answers per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.datasets import Prompt
from tulu_hpc.data.loader import pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.data.records import content_id
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.advantages import group_advantages
from tulu_hpc.objectives.policy import policy_terms
from tulu_hpc.objectives.terms import Terms, own_targets, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import Completion, Request, Sampling
from tulu_hpc.rollout.sampling import derive_seed
from tulu_hpc.rollout.texts import completion_text, ended_itself
from tulu_hpc.stages import rlvr_gate, rlvr_metrics
from tulu_hpc.stages.rlvr_metrics import Mismatch, RolloutStats
from tulu_hpc.stages.rollouts import LOSSES, is_replica_leader, lost_verdicts, verifier_record, verify_in_replica
from tulu_hpc.stages.served import ServedEngine
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training.normalisation import GlobalCounts, global_counts
from tulu_hpc.training.runner import LossFn, Runner, row_multiple
from tulu_hpc.training.step import StepResult, train_step
from tulu_hpc.training.trainer import Trainer
from tulu_hpc.verifiers.sandbox import VerifierPool


@dataclass
class Learner:
    """What one process needs for a rollout step; `reference` is None when kl_coef is 0."""

    run: Run
    config: RlvrConfig
    trainer: Trainer
    reference: Runner | None
    engine: EmbeddedEngine | ServedEngine
    pool: VerifierPool | None  # on the leader of the replica
    prompts: list[Prompt]
    sampling: Sampling
    tokenizer: Any
    pad_id: int


@dataclass(frozen=True)
class Group:
    """The answers to one prompt of a step; `number` is the prompt's place in the step."""

    number: int
    prompt: Prompt
    completions: list[Completion]
    rewards: list[float]
    advantages: list[float] | None  # None: all rewards are equal


def rollout_step(
    learner: Learner, step: int, *, check_mismatch: bool, stop_requested: bool
) -> tuple[dict[str, float], bool]:
    """One step on this process's share of the prompts: metrics of the whole job, and whether some rank is to stop."""
    config, groups = learner.config, learner.run.groups
    clock = rlvr_metrics.Clock()
    rollouts = generate(learner, step)
    clock.lap("rollout")
    scored = score_rollouts(learner, rollouts)
    verdicts = count_verdicts(learner, step)
    clock.lap("verify")
    minibatches = [
        pack_groups(learner, [group for group in scored if minibatch_of(group.number, config) == index])
        for index in range(config.rlvr.minibatches)
    ]
    counts = [global_counts(packs, groups) for packs in minibatches]
    if learner.reference is not None:
        for packs in minibatches:
            add_logprobs("reference_logprobs", learner.reference, packs)
    clock.lap("reference")
    if check_mismatch:
        rlvr_gate.check_first(learner, step, minibatches)
    mismatch = Mismatch()
    results: list[StepResult] = []
    for epoch in range(config.rlvr.epochs):
        for packs, count in zip(minibatches, counts, strict=True):
            if count.targets == 0:
                continue
            # Only before the first update do trainer and engine hold the same weights.
            watch = mismatch if epoch == 0 and not results else None
            results.append(train_step(learner.trainer, packs, policy_loss(learner, count, watch)))
    learner.engine.version = learner.trainer.step
    clock.lap("train")
    rlvr_gate.require_match(
        learner, step, mismatch if groups.tp_rank == 0 else Mismatch(), "the step was trained, but is not saved"
    )
    stats = rollout_stats(learner, scored) if is_replica_leader(groups) else None
    share = {"stats": stats, "mismatch": mismatch if groups.tp_rank == 0 else None, "stop": stop_requested}
    shares = groups.all_gather_object(share)
    updates = config.rlvr.epochs * config.rlvr.minibatches
    metrics = {
        **rlvr_metrics.rollout_metrics([each["stats"] for each in shares if each["stats"] is not None]),
        **rlvr_metrics.mismatch_metrics([each["mismatch"] for each in shares if each["mismatch"] is not None]),
        **{f"verifier/{name}": float(verdicts[name]) for name in LOSSES},
        **update_metrics(results, updates),
        **clock.metrics(),
    }
    return metrics, any(each["stop"] for each in shares)


def count_verdicts(learner: Learner, step: int) -> dict[str, int]:
    """Verdicts of this step, all replicas together, before anything is trained on them.

    Raises:
        VerifierError: too many were lost.
    """
    pool = learner.pool
    shares = learner.run.groups.all_gather_object(pool.take_stats().as_dict() if pool else None)
    counts = [share for share in shares if share is not None]
    return lost_verdicts(counts, learner.config.verifier.max_lost_share, f"rlvr step {step}")


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
        scored.append(Group(number, prompt, completions, rewards, group_advantages(rewards, rlvr.advantage)))
    return scored


def minibatch_of(number: int, config: RlvrConfig) -> int:
    """The minibatch of the step's prompt `number`; known without communication and the same for any layout."""
    return number * config.rlvr.minibatches // config.rlvr.prompts_per_step


def pack_groups(learner: Learner, groups: Sequence[Group]) -> list[PackedBatch]:
    """Packs of the groups that have an advantage, with the columns `advantage` and `behaviour_logprobs`."""
    config = learner.config
    items = [
        Item(
            "group",
            [TokenSequence(torch.tensor(completion.token_ids)) for completion in group.completions],
            prompt=torch.tensor(group.prompt.token_ids),
            per_sequence={"advantage": group.advantages},
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
    """Add the log-probs of a model that is not trained here as a column of each pack; collective."""
    for pack, logprobs_K in zip(packs, runner.logprobs(packs), strict=True):
        pack.per_target[name] = logprobs_K.cpu()


def policy_loss(learner: Learner, counts: GlobalCounts, watch: Mismatch | None) -> LossFn:
    """The loss of one minibatch of all ranks. `watch` collects the difference between engine and trainer."""
    rlvr, groups = learner.config.rlvr, learner.run.groups

    def loss(output: TokenLogprobs, batch: RankBatch) -> Terms:
        pack = batch.batch
        advantages_Q = pack.per_sequence.get("advantage", output.logprobs_K.new_zeros(0))
        sequence_id_K = own_targets(pack.sequence_id_K, batch)
        behaviour_K = _column(pack, "behaviour_logprobs", batch, output.logprobs_K)
        if watch is not None:
            watch.add(output.logprobs_K.detach(), behaviour_K)
        return policy_terms(
            output.logprobs_K,
            behaviour_logprobs_K=behaviour_K,
            advantages_K=advantages_Q[sequence_id_K],
            sequence_id_K=sequence_id_K,
            lengths_Q=sequence_lengths(pack.sequence_id_K, pack.num_sequences),
            kind=rlvr.kind,
            normalisation=rlvr.normalisation,
            global_count=counts.targets if rlvr.normalisation == "token_mean" else counts.sequences,
            clip_low=rlvr.clip_low,
            clip_high=rlvr.clip_high,
            kl_coef=rlvr.kl_coef,
            kl_kind=rlvr.kl_kind,
            reference_logprobs_K=(
                _column(pack, "reference_logprobs", batch, output.logprobs_K) if learner.reference is not None else None
            ),
            cp_group=groups.pg.cp if groups.cp_size > 1 else None,
        )

    return loss


def _column(pack: PackedBatch, name: str, batch: RankBatch, like_K: Tensor) -> Tensor:
    """A column of the pack at this rank's targets; an empty pack has no columns."""
    column = pack.per_target.get(name)
    return like_K.new_zeros(0) if column is None else own_targets(column, batch)


def rollout_stats(learner: Learner, scored: Sequence[Group]) -> RolloutStats:
    """Counts of this replica's answers of a step."""
    stats = RolloutStats()
    full = learner.config.rlvr.verification_reward
    for group in scored:
        name = "+".join(group.prompt.record.dataset)
        stats.groups += 1
        stats.live_groups += group.advantages is not None
        for completion, reward in zip(group.completions, group.rewards, strict=True):
            stats.add(name, reward, reward / full if full else 0.0, completion, ended_itself(completion))
    return stats


def update_metrics(results: Sequence[StepResult], planned: int) -> dict[str, float]:
    """Means over the step's optimizer steps; none at all when every group had equal rewards."""
    metrics: dict[str, float] = {"train/updates": len(results), "train/skipped_updates": planned - len(results)}
    if not results:
        return metrics
    for name in dict.fromkeys(name for each in results for name in each.metrics):
        values = [each.metrics[name] for each in results if name in each.metrics]
        metrics[f"train/{name.removeprefix('policy/')}"] = _mean(values)
    metrics["train/grad_norm"] = _mean([each.grad_norm for each in results])
    metrics["train/lr"] = results[-1].lr
    metrics["train/skipped_steps"] = results[-1].skipped_steps
    metrics["train/tokens"] = sum(each.targets for each in results)
    return metrics


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Identity of the prompts and their order."""
    return content_id([prompt.record.id for prompt in prompts])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
