"""PPO's value model: opening it, and from the answers of a step to advantages per token and its own updates.

Policy and value model may have different layouts, so that their packs and their shares of the answers differ. What they
exchange goes by the number of the answer in the step (`sample`): prompts, answers and token rewards to the value model,
token advantages back, as objects among data-parallel ranks; that is a few numbers per token, and every process gets all
of them. With equal layouts every replica keeps its own answers and nothing is sent.

Shapes: K scored tokens of a pack, Q sequences of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.config.layer_spec import row_step
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.rlvr_sections import ValueSection
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.kernels import whiten
from tulu_hpc.models.scalar_head import RowValues
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.objectives.value import sequence_offsets, token_advantages, token_rewards, value_terms
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups, layout_of
from tulu_hpc.parallel.second_layout import second_layout
from tulu_hpc.stages.rlvr_learner import Learner, ValueModel
from tulu_hpc.stages.rlvr_loss import column
from tulu_hpc.stages.rlvr_packs import minibatch_of, pack_for, sample_numbers
from tulu_hpc.stages.rlvr_rollouts import Group
from tulu_hpc.stages.training_run import Run, read_architecture
from tulu_hpc.training.non_finite import NonFiniteWatch
from tulu_hpc.training.normalisation import GlobalCounts, global_counts
from tulu_hpc.training.runner import LossFn, target_values
from tulu_hpc.training.step import StepResult, train_step
from tulu_hpc.training.trainer import build_trainer

_Numbered = tuple[int, Item]  # with the number of the prompt in the step


def open_value_model(run: Run, config: RlvrConfig, total_steps: int) -> ValueModel:
    """Build and load it, at its own layout over the same processes. Collective.

    Raises:
        ConfigError: it is not the expected model, or reads other tokens than the policy.
        LayoutError: its layout fits neither the processes nor the model.
        ValueError: `value.model.path` is a language model and value.new_head is off.
    """
    section = config.value
    assert section is not None
    architecture = read_architecture(section.model)
    _check_tokens(config, section, run.architecture.vocab_size, architecture.vocab_size)
    parallel = section.parallel or config.parallel
    layout = layout_of(parallel, row_step(section.model, parallel, config.train.pack_rows))
    place = second_layout(layout, run.groups, timeout_minutes=config.run.distributed_timeout_minutes)
    with place.active():
        trainer = build_trainer(
            model=section.model,
            parallel=parallel,
            optimizer=section.optimizer,
            recompute=section.recompute,
            total_steps=total_steps,
            groups=place.groups,
            architecture=architecture,
            head="value",
            new_head_seed=config.run.seed if section.new_head else None,
        )
    trainer.watch = NonFiniteWatch(config.train.nan_watch, run.directory.root)
    return ValueModel(trainer, place)


def _check_tokens(config: RlvrConfig, section: ValueSection, policy_rows: int, value_rows: int) -> None:
    if value_rows < policy_rows:
        raise ConfigError(
            f"value.model.path {section.model.path}: has {value_rows} vocabulary rows, the policy may sample any of "
            f"{policy_rows} tokens"
        )
    theirs = load_tokenizer(section.model.path, value_rows).get_vocab()
    if theirs != load_tokenizer(config.model.path, policy_rows).get_vocab():
        raise ConfigError(
            f"value.model.path {section.model.path}: its tokenizer is not that of model.path {config.model.path}; the "
            "value model reads the policy's token ids"
        )


@dataclass
class Experience:
    """What the value model has made of a step's answers.

    Attributes:
        packs: per minibatch, this replica's share of the value model, with the columns `old_values` and `returns`.
        counts: of these.
        metrics: of the whole job, from before the first update.
        results: of the value model's optimizer steps so far.
    """

    model: ValueModel
    section: ValueSection
    packs: list[list[PackedBatch]]
    counts: list[GlobalCounts]
    metrics: dict[str, float]
    results: list[StepResult] = field(default_factory=list)

    def train(self, minibatch: int) -> None:
        """One optimizer step of the value model. Collective."""
        with self.model.place.active():
            loss = value_loss_of(self.section, self.counts[minibatch])
            self.results.append(train_step(self.model.trainer, self.packs[minibatch], loss))

    def all_metrics(self) -> dict[str, float]:
        """`metrics`, and means over the optimizer steps as `value/...`."""
        found = dict(self.metrics)
        for name in self.results[0].metrics if self.results else ():
            values = [each.metrics[name] for each in self.results]
            found[f"value/{'mean' if name == 'value' else name}"] = sum(values) / len(values)
        if self.results:
            found["value/grad_norm"] = sum(each.grad_norm for each in self.results) / len(self.results)
            found["value/lr"] = self.results[-1].lr
            found["value/skipped_steps"] = self.results[-1].skipped_steps
        return found


def prepare_experience(
    learner: Learner, scored: Sequence[Group], minibatches: Sequence[Sequence[PackedBatch]]
) -> Experience:
    """Values, returns and advantages of a step, once and before any update. Collective.

    Args:
        scored: this replica's answers.
        minibatches: the policy's packs of these, with the log-probs that were asked for; they get the column
            `advantages`.
    """
    config, model, policy = learner.config, learner.value, learner.run.groups
    assert model is not None and config.value is not None
    section, packs = config.value, [pack for packs in minibatches for pack in packs]
    rewards, kl = reward_columns(config, packs)
    items = _value_items(config, scored, rewards)
    value_groups, shared = model.place.groups, model.place.groups is policy
    if not shared:
        everyone = [each for share in policy.all_gather_over_replicas(items) for each in share]
        items = sorted(
            (each for each in everyone if each[0] % value_groups.dp_size == value_groups.dp_rank), key=lambda x: x[0]
        )
    value_packs = [
        pack_for(
            [item for number, item in items if minibatch_of(number, config) == index],
            config,
            value_groups.layout,
            section.parallel or config.parallel,
            learner.pad_id,
        )
        for index in range(config.rlvr.minibatches)
    ]
    advantages = _add_returns(
        model, section, [pack for packs in value_packs for pack in packs], learner.throughput.phase("values")
    )
    metrics = _statistics(value_packs, value_groups) | _kl_metrics(config, packs, kl, policy)
    if not shared:
        shares = value_groups.all_gather_over_replicas(advantages)
        advantages = {sample: each for share in shares for sample, each in share.items()}
    _add_advantages(section, packs, advantages, policy)
    return Experience(model, section, value_packs, [global_counts(each, value_groups) for each in value_packs], metrics)


def reward_columns(config: RlvrConfig, packs: Sequence[PackedBatch]) -> tuple[dict[int, Tensor], list[Tensor]]:
    """(rewards per token of each answer of the policy's packs, KL estimate per token of each pack)."""
    rlvr = config.rlvr
    rewards: dict[int, Tensor] = {}
    estimates = []
    for pack in packs:
        in_reward = rlvr.kl_in == "reward" and rlvr.kl_coef > 0
        old = "old_logprobs" if rlvr.uses_own_logprobs else "behaviour_logprobs"
        rewards_K, kl_K = token_rewards(
            pack.per_sequence["reward"],
            sequence_offsets(pack.sequence_id_K, pack.num_sequences),
            logprobs_K=pack.per_target[old] if in_reward else None,
            reference_logprobs_K=pack.per_target["reference_logprobs"] if in_reward else None,
            kl_coef=rlvr.kl_coef,
            kl_kind=rlvr.kl_kind,
        )
        rewards |= by_sample(pack, rewards_K)
        estimates.append(kl_K)
    return rewards, estimates


def by_sample(pack: PackedBatch, column_K: Tensor) -> dict[int, Tensor]:
    """A column of a pack as one tensor per answer."""
    lengths = torch.bincount(pack.sequence_id_K, minlength=pack.num_sequences).tolist()
    numbers = pack.per_sequence["sample"].long().tolist() if pack.num_sequences else []
    # Clones: a view would be pickled with the whole column.
    return {number: part.clone() for number, part in zip(numbers, column_K.split(lengths), strict=True)}


def _value_items(config: RlvrConfig, scored: Sequence[Group], rewards: Mapping[int, Tensor]) -> list[_Numbered]:
    items = []
    for group in scored:
        numbers = sample_numbers(group, config)
        item = Item(
            "group",
            [TokenSequence(torch.tensor(completion.token_ids)) for completion in group.completions],
            prompt=torch.tensor(group.prompt.token_ids),
            per_sequence={"sample": numbers},
            per_target={"rewards": [rewards[int(number)] for number in numbers]},
            id=group.prompt.record.id,
            source=group.prompt.record.source,
        )
        items.append((group.number, item))
    return items


def _add_returns(
    model: ValueModel, section: ValueSection, packs: Sequence[PackedBatch], timed: AbstractContextManager[None]
) -> dict[int, Tensor]:
    """Columns `old_values` and `returns` of the value model's packs; advantages of their answers, not whitened."""
    advantages: dict[int, Tensor] = {}
    with model.place.active():
        model.trainer.synchronise_parameters()
        with timed:
            values = model.trainer.runner.values(packs)
    for pack, values_K in zip(packs, values, strict=True):
        values_K = values_K.cpu()
        offsets_Q1 = sequence_offsets(pack.sequence_id_K, pack.num_sequences)
        rewards_K = pack.per_target["rewards"]
        advantages_K, returns_K = token_advantages(
            rewards_K, values_K, offsets_Q1, gamma=section.gamma, lam=section.lam
        )
        pack.per_target |= {"old_values": values_K, "returns": returns_K}
        advantages |= by_sample(pack, advantages_K)
    return advantages


def _add_advantages(
    section: ValueSection, packs: Sequence[PackedBatch], advantages: Mapping[int, Tensor], policy: Groups
) -> None:
    """Column `advantages` of the policy's packs, whitened over the tokens of the whole step if asked for."""
    columns = [
        torch.cat([advantages[number] for number in pack.per_sequence["sample"].long().tolist()]) for pack in packs
    ]
    sizes = [len(each) for each in columns]
    flat = torch.cat(columns) if columns else torch.zeros(0)
    if section.whiten:
        flat = whiten(flat.to(default_device()), group=policy.pg.dp).cpu()
    for pack, advantages_K in zip(packs, flat.split(sizes) if sizes else (), strict=True):
        pack.per_target["advantages"] = advantages_K


def value_loss_of(section: ValueSection, counts: GlobalCounts) -> LossFn:
    """The loss of one minibatch of all ranks: the mean over its tokens."""

    def loss(output: RowValues, batch: RankBatch) -> Terms:
        values_K = target_values(output, batch)
        return value_terms(
            values_K,
            old_values_K=column(batch.batch, "old_values", batch, values_K),
            returns_K=column(batch.batch, "returns", batch, values_K),
            clip=section.clip,
            coef=section.coef,
            global_tokens=counts.targets,
        )

    return loss


def _statistics(minibatches: Sequence[Sequence[PackedBatch]], groups: Groups) -> dict[str, float]:
    """Advantages before whitening, returns, and the share of the returns' variance that the values explain."""
    returns = [pack.per_target["returns"].double() for packs in minibatches for pack in packs]
    errors = [
        pack.per_target["returns"].double() - pack.per_target["old_values"].double()
        for packs in minibatches
        for pack in packs
    ]
    sums = [float(sum(len(each) for each in returns))]
    for parts in (errors, returns):
        sums += [sum(float(each.sum()) for each in parts), sum(float(each.square().sum()) for each in parts)]
    count, *moments = _sum_over_replicas(sums, groups)
    found: dict[str, float] = {}
    for name, (total, squares) in zip(("advantages", "returns"), (moments[:2], moments[2:]), strict=True):
        found[f"{name}/mean"] = total / count
        found[f"{name}/std"] = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
    if found["returns/std"] > 0:
        found["value/explained_variance"] = 1.0 - (found["advantages/std"] / found["returns/std"]) ** 2
    return found


def _kl_metrics(
    config: RlvrConfig, packs: Sequence[PackedBatch], kl: Sequence[Tensor], groups: Groups
) -> dict[str, float]:
    """Mean KL estimate per token, and the mean penalty per answer, where KL is in the reward."""
    if config.rlvr.kl_in != "reward" or config.rlvr.kl_coef == 0:
        return {}
    sums = [
        sum(float(each.double().sum()) for each in kl),
        float(sum(len(each) for each in kl)),
        float(sum(pack.num_sequences for pack in packs)),
    ]
    total, tokens, answers = _sum_over_replicas(sums, groups)
    return {"rewards/kl": total / tokens, "rewards/kl_penalty": config.rlvr.kl_coef * total / answers}


def _sum_over_replicas(values: Sequence[float], groups: Groups) -> list[float]:
    if groups.dp_size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=default_device())
    dist.all_reduce(tensor, group=groups.pg.dp)
    return [float(value) for value in tensor.tolist()]
