"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tulu_hpc.config.schema import SftConfig
from tulu_hpc.data.loader import StepData
from tulu_hpc.models.embedding_noise import add_noise_columns
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.sft import sft_terms
from tulu_hpc.objectives.sources import source_names, token_source_metrics
from tulu_hpc.objectives.terms import Terms, own_targets
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.stages import training_run
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training.normalisation import global_counts
from tulu_hpc.training.runner import LossFn


def run(config: SftConfig) -> Path:
    """Train on `data.path` for `train.steps` or `train.epochs`; return the run directory.

    A run directory that holds a checkpoint is continued, a finished one is left as it is.

    Raises:
        ConfigError, RecordError, LayoutError: naming the key, file, line or rank.
        Preempted: the run was asked to stop; its state is saved.
    """
    run = training_run.open_run(config, "sft")
    if run.finished:
        return run.already_finished()
    items, pad_id = training_run.load_items(run)
    loader = training_run.make_loader(run, items, pad_id=pad_id)
    trainer = training_run.make_trainer(run, total_steps=loader.num_steps)
    training_run.resume(run, trainer, loader)
    names = source_names(items)
    training_run.fit(run, trainer, loader, lambda data: batch_loss(run, config, data, names))
    return training_run.finish(run, trainer)


def batch_loss(run: Run, config: SftConfig, data: StepData, names: Sequence[str] = ()) -> LossFn:
    """The loss of one global batch: token losses over a divisor that no layout can change."""
    if config.sft.normalisation == "token_mean":
        divisor = float(global_counts(data.packs, run.groups).targets)
    else:
        divisor = config.sft.sum_divisor or float(config.train.global_batch_size or 0)
    if config.sft.neftune_alpha:
        add_noise_columns(data.packs, alpha=config.sft.neftune_alpha, seed=config.run.seed, step=data.step)

    def loss(output: TokenLogprobs, batch: RankBatch) -> Terms:
        terms, pack = sft_terms(output.logprobs_K, divisor=divisor), batch.batch
        item_K = pack.per_sequence["item"][own_targets(pack.sequence_id_K, batch)]
        by_source = token_source_metrics(output.logprobs_K, item_K, pack.sources, names)
        return Terms(terms.loss, {**terms.metrics, **by_source})

    return loss
