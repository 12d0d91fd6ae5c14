"""Reward model: a scalar head trained on preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tulu_hpc.config.schema import RewardModelConfig
from tulu_hpc.data.loader import StepData, check_sizes
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.data.readout import with_readout
from tulu_hpc.models.scalar_head import RowValues
from tulu_hpc.objectives.reward import pair_metrics, pair_scores, reward_terms
from tulu_hpc.objectives.sources import pair_source_metrics, source_names
from tulu_hpc.objectives.terms import Terms, own_targets
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.stages import training_run
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training.pair_sums import PackOptions, compute_sums, item_key
from tulu_hpc.training.runner import LossFn, row_multiple, target_values
from tulu_hpc.training.trainer import Trainer


def run(config: RewardModelConfig) -> Path:
    """Train on the pairs of `data.path`, score those of `rm.eval_path`; return the run directory.

    Export is Hugging Face's sequence classification with one label. Resuming is as in SFT.

    Raises:
        ConfigError, RecordError, LayoutError: naming the key, file, line or rank.
        ValueError: a pair, also a held-out one, that fits into no pack.
        Preempted: the run was asked to stop; its state is saved.
    """
    run = training_run.open_run(config, "rm")
    if run.finished:
        return run.already_finished()
    items, pad_id = training_run.load_items(run)
    items = [with_readout(item) for item in items]
    held_out: list[Item] = []
    if config.rm.eval_path:
        pairs, _ = training_run.load_items(run, config.rm.eval_path)
        held_out = [with_readout(item) for item in pairs]
        multiple = row_multiple(run.groups.layout, config.parallel.context_split)
        check_sizes(held_out, capacity=config.train.pack_rows, multiple=multiple, share=config.train.prefix_sharing)
    loader = training_run.make_loader(run, items, pad_id=pad_id)
    trainer = training_run.make_trainer(run, total_steps=loader.num_steps, head="value")
    training_run.resume(run, trainer, loader)
    names = source_names(items)
    options = PackOptions(config.train.pack_rows, config.train.prefix_sharing, pad_id)

    def evaluate_after(step: int) -> dict[str, float]:
        due = step == loader.num_steps or (config.rm.eval_every is not None and step % config.rm.eval_every == 0)
        if not (held_out and due):
            return {}
        metrics = evaluate(trainer, held_out, options)
        run.say(f"step {step}: held-out accuracy {metrics['eval/rewards/accuracies']:.4f}")
        return metrics

    training_run.fit(run, trainer, loader, lambda data: batch_loss(run, data, names), evaluate=evaluate_after)
    return training_run.finish(run, trainer)


def batch_loss(run: Run, data: StepData, names: Sequence[str]) -> LossFn:
    """The loss of one global batch: the mean over its pairs."""
    group = run.groups.pg.cp if run.groups.cp_size > 1 else None

    def loss(output: RowValues, batch: RankBatch) -> Terms:
        pack = batch.batch
        scores_P2 = pair_scores(
            target_values(output, batch),
            sequence_id_K=own_targets(pack.sequence_id_K, batch),
            num_sequences=pack.num_sequences,
            pairs_P2=pack.pairs_P2,
            cp_group=group,
        )
        return reward_terms(
            scores_P2,
            global_pairs=data.num_items_global,
            cp_group=group,
            sources=pack.sources,
            source_names=names,
        )

    return loss


def evaluate(trainer: Trainer, items: Sequence[Item], options: PackOptions) -> dict[str, float]:
    """Means over held-out pairs as `eval/loss`, `eval/rewards/...`, by source too; equal on all ranks. Collective."""
    trainer.synchronise_parameters()
    keys = [item_key(item) for item in items]
    scores = compute_sums(dict(zip(keys, items, strict=True)), trainer.runner, options, read=trainer.runner.values)
    scores_P2 = torch.tensor([scores[key] for key in keys], dtype=torch.float64)
    metrics = {name: float(total) / len(items) for name, total in pair_metrics(scores_P2).items()}
    by_source = pair_source_metrics(
        lambda pairs: pair_metrics(scores_P2[pairs]),
        [item.source for item in items],
        source_names(items),
        device=scores_P2.device,
    )
    metrics |= {name: float(total) / float(count) for name, (total, count) in by_source.items()}
    return {f"eval/{name}": value for name, value in metrics.items()}
