"""One step: prompts -> answers -> verdicts -> rewards -> advantages -> packs -> log-probs (-> values) -> updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.rollout.engine import Completion
from tulu_hpc.rollout.texts import ended_itself
from tulu_hpc.stages import rlvr_gate, rlvr_metrics, rlvr_values
from tulu_hpc.stages.rlvr_ahead import Ahead
from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rlvr_loss import policy_loss
from tulu_hpc.stages.rlvr_metrics import RolloutStats
from tulu_hpc.stages.rlvr_mismatch import Mismatch, mismatch_metrics
from tulu_hpc.stages.rlvr_off_policy import (
    ImportanceStats,
    importance_metrics,
    importance_stats,
    require_fresh_everywhere,
    staleness_metrics,
)
from tulu_hpc.stages.rlvr_packs import add_logprobs, minibatch_of, pack_groups
from tulu_hpc.stages.rlvr_rollouts import Group
from tulu_hpc.stages.rlvr_sampling import answer_now, sample_groups, sampling_metrics
from tulu_hpc.stages.rlvr_throughput import (
    Figures,
    ModelPhase,
    forward_figures,
    trained_figures,
)
from tulu_hpc.stages.rlvr_values import Experience
from tulu_hpc.stages.rollouts import LOSSES, is_replica_leader, lost_verdicts
from tulu_hpc.stages.throughput import of_value_model
from tulu_hpc.training.normalisation import global_counts
from tulu_hpc.training.step import StepResult, train_step


def rollout_step(
    learner: Learner, step: int, *, check_mismatch: bool, stop_requested: bool, ahead: Ahead | None = None
) -> tuple[dict[str, float], bool]:
    """One step on this process's share of the prompts: metrics of the whole job, and whether some rank is to stop.

    Args:
        ahead: who has the groups of an asynchronous run.
    """
    config, groups, throughput = learner.config, learner.run.groups, learner.throughput
    clock = rlvr_metrics.Clock()
    learner.begin_step()
    if ahead is None:
        sampled = sample_groups(learner, step, answer_now(learner, step, clock))
        own_verdicts = learner.pool.take_stats().as_dict() if learner.pool else None
    else:
        ahead.begin(step)
        clock.lap("weights")
        sampled = sample_groups(learner, step, ahead.answer(step, clock))
        ahead.go_on(step, sampled.position)
        own_verdicts = ahead.verdicts if ahead.producer else None
    verdicts = count_verdicts(learner, step, own_verdicts)
    most = config.asynchrony.max_staleness
    ages = require_fresh_everywhere(groups, named_samples(sampled.groups), learner.versions, most)
    weights_before = learner.trainer.step
    minibatches = [
        pack_groups(learner, [group for group in sampled.groups if minibatch_of(group.number, config) == index])
        for index in range(config.rlvr.minibatches)
    ]
    counts = [global_counts(packs, groups) for packs in minibatches]
    if learner.reference is not None:
        with throughput.phase("reference"):
            for packs in minibatches:
                add_logprobs("reference_logprobs", learner.reference, packs)
    clock.lap("reference")
    own = config.rlvr.uses_own_logprobs
    weights, mismatch = ImportanceStats(), Mismatch()
    if own:
        with throughput.phase("old_logprobs"):
            for packs in minibatches:
                add_logprobs("old_logprobs", learner.trainer.runner, packs)
        weights = importance_stats([pack for packs in minibatches for pack in packs], config.rlvr)
        mismatch = rlvr_gate.check_own(learner, step, minibatches)
    elif check_mismatch:
        rlvr_gate.check_first(learner, step, minibatches)
    clock.lap("old_logprobs")
    experience = None
    if learner.value is not None:
        experience = rlvr_values.prepare_experience(learner, sampled.groups, minibatches)
        clock.lap("values")
    results: list[StepResult] = []
    for epoch in range(config.rlvr.epochs):
        for index, (packs, count) in enumerate(zip(minibatches, counts, strict=True)):
            if count.targets == 0:
                continue
            # Only before the first update do trainer and engine hold the same weights.
            watch = mismatch if epoch == 0 and not results and not own else None
            with throughput.phase("train"):
                results.append(train_step(learner.trainer, packs, policy_loss(config, groups, count, watch)))
            if experience is not None:
                with throughput.phase("value_train"):
                    experience.train(index)
    learner.engine.version = learner.trainer.step
    clock.lap("train")
    if not own:
        rlvr_gate.require_match(learner, step, mismatch if groups.tp_rank == 0 else Mismatch(), trained=True)
    leader = is_replica_leader(groups)
    share = {
        "stats": rollout_stats(learner, [*sampled.groups, *sampled.dropped]) if leader else None,
        "ages": ages if leader else None,
        "weights": weights if leader else None,
        "mismatch": mismatch if groups.tp_rank == 0 else None,
        "scores": ahead.mismatch if ahead is not None and groups.is_main else None,
        "figures": forward_phases(learner, minibatches, experience),
        "stop": stop_requested,
    }
    shares = groups.all_gather_object(share)

    def of(name: str) -> list[Any]:
        return [each[name] for each in shares if each[name] is not None]

    figures = all_phases(learner, of("figures"), results, experience)
    updates = config.rlvr.epochs * config.rlvr.minibatches
    metrics = {
        **rlvr_metrics.rollout_metrics(of("stats")),
        **sampling_metrics(learner, sampled),
        **staleness_metrics(of("ages")),
        **importance_metrics(of("weights")),
        **mismatch_metrics([*of("mismatch"), *of("scores")]),
        **{f"verifier/{name}": float(verdicts[name]) for name in LOSSES},
        **update_metrics(results, updates),
        **(experience.all_metrics() if experience is not None else {}),
        **throughput.metrics(step, figures),
        **clock.metrics(),
    }
    learner.position = sampled.position
    if ahead is not None:
        metrics["rollout/stale_refused"] = float(ahead.refused)
        ahead.finish_step(step, sampled.groups, weights_before)
    return metrics, any(each["stop"] for each in shares)


def forward_phases(
    learner: Learner, minibatches: Sequence[Sequence[PackedBatch]], experience: Experience | None
) -> dict[ModelPhase, Figures]:
    """What this replica, on its leader, read without training on it."""
    found: dict[ModelPhase, Figures] = {}
    if is_replica_leader(learner.run.groups):
        packs = forward_figures(learner.run.architecture, [pack for packs in minibatches for pack in packs])
        if learner.reference is not None:
            found["reference"] = packs
        if learner.config.rlvr.uses_own_logprobs:
            found["old_logprobs"] = packs
    if experience is not None and is_replica_leader(experience.model.place.groups):
        shape = of_value_model(experience.model.trainer.architecture)
        found["values"] = forward_figures(shape, [pack for packs in experience.packs for pack in packs])
    return found


def all_phases(
    learner: Learner,
    shares: Sequence[dict[ModelPhase, Figures]],
    results: Sequence[StepResult],
    experience: Experience | None,
) -> dict[ModelPhase, Figures]:
    """The phases in which something was read, of the whole job.

    Args:
        shares: `forward_phases` of all ranks.
    """
    found: dict[ModelPhase, Figures] = {}
    for share in shares:
        for name, figures in share.items():
            found[name] = found.get(name, Figures()) + figures
    found["train"] = trained_figures(learner.run.architecture, results, learner.config.train.recompute)
    if experience is not None:
        shape = of_value_model(experience.model.trainer.architecture)
        found["value_train"] = trained_figures(shape, experience.results, experience.section.recompute)
    return {name: figures for name, figures in found.items() if figures.rows}


def count_verdicts(learner: Learner, step: int, own: dict[str, int] | None) -> dict[str, int]:
    """Verdicts of this step, all replicas together, before anything is trained on them.

    Args:
        own: those of this replica, on its leader.

    Raises:
        VerifierError: too many were lost.
    """
    shares = learner.run.groups.all_gather_object(own)
    counts = [share for share in shares if share is not None]
    return lost_verdicts(counts, learner.config.verifier.max_lost_share, f"rlvr step {step}")


def named_samples(scored: Sequence[Group]) -> Iterator[tuple[str, Completion]]:
    """Completions with their ids, `RECORD#NUMBER`."""
    for group in scored:
        for number, completion in enumerate(group.completions):
            yield f"{group.prompt.record.id}#{number}", completion


def rollout_stats(learner: Learner, scored: Sequence[Group]) -> RolloutStats:
    """Counts of this replica's answers of a step."""
    stats = RolloutStats()
    full = learner.config.rlvr.verification_reward
    for group in scored:
        name = "+".join(group.prompt.record.dataset)
        stats.groups += 1
        stats.live_groups += group.advantages is not None or learner.value is not None
        for completion, verified, reward in zip(group.completions, group.verified, group.rewards, strict=True):
            stats.add(name, reward, verified / full if full else 0.0, completion, ended_itself(completion))
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
