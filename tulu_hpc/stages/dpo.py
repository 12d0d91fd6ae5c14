"""Preference optimisation (dpo.kind) against the model it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.run_directory import RunDirectory
from tulu_hpc.config.schema import DpoConfig
from tulu_hpc.data.datasets import LABEL, WEIGHT
from tulu_hpc.data.loader import StepData
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.preference import labelled_pairs, preference_terms
from tulu_hpc.objectives.sources import source_names
from tulu_hpc.objectives.terms import Terms, own_targets, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.stages import kto_baseline, training_run
from tulu_hpc.stages.kto_baseline import Baseline
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training import reference
from tulu_hpc.training.runner import LossFn, Runner, row_multiple
from tulu_hpc.training.trainer import Trainer, load_model

# (absolute, relative) difference allowed between a cached log-prob and its recomputation by another layout or kernel:
# rounding in fp32; in bf16 about 0.05 per token, of both signs, over a few hundred tokens.
TOLERANCE = {"float32": (1e-3, 1e-4), "bfloat16": (2.0, 2e-2)}


def run(config: DpoConfig) -> Path:
    """Train on the pairs (kto: also on single, labelled answers) of `data.path`; return the run directory.

    The reference is the model at `model.path` (simpo and orpo need none). Cached, its log-probs are computed (or found
    on disk and checked) before the first step, and then it is not needed again. Resident, a second copy of the model
    reads the packs of every step. Resuming is as in SFT.

    Raises:
        ConfigError, RecordError, LayoutError: naming the key, file, line or rank.
        ReferenceError: cached log-probs are not those of this reference model.
        Preempted: the run was asked to stop; its state is saved.
    """
    run = training_run.open_run(config, "dpo")
    if run.finished:
        return run.already_finished()
    items, pad_id = training_run.load_items(run)
    # Also refuses a pair that fits into no pack, before any work is done.
    steps = training_run.make_loader(run, items, pad_id=pad_id).num_steps
    trainer = training_run.make_trainer(run, total_steps=steps)
    resident: Runner | None = None
    if config.dpo.reference == "resident":
        resident = reference_model(config, run.groups, run.architecture)
    others = mismatched_items(run, config, items)
    if config.dpo.reference == "cached" and config.dpo.needs_reference:
        directory = Path(config.dpo.reference_cache or run.directory.root / "reference")
        both = add_reference(run, config, trainer.runner, [*items, *others], pad_id, directory)
        items, others = both[: len(items)], both[len(items) :]
    prepare(config, trainer)
    baseline: Baseline | None = None
    if config.dpo.kl_estimate:
        options = pack_options(config, pad_id)
        baseline = Baseline({item.id: item for item in others}, trainer.runner, resident, options)
    loader = training_run.make_loader(run, items, pad_id=pad_id)
    training_run.resume(run, trainer, loader)
    names = source_names(items)

    def make_loss(data: StepData) -> LossFn:
        if resident is not None:
            with trainer.clock.phase("forward"):
                reference.add_sums(data.packs, resident)
        kl = None
        if baseline is not None:
            with trainer.clock.phase("forward"):
                kl = baseline.estimate(data.packs)
        return batch_loss(run, config, data, names, kl)

    training_run.fit(run, trainer, loader, make_loss)
    return training_run.finish(run, trainer)


def prepare(config: DpoConfig, trainer: Trainer) -> None:
    """Make the model return what the configured loss needs beside log-probs."""
    for model in trainer.models:
        model.return_alignment = config.dpo.wpo_alignment


def compute_reference(config: DpoConfig) -> Path:
    """Only fill `dpo.reference_cache` for the pairs of `data.path`, on any machine and layout; return that directory.

    Raises:
        ConfigError, RecordError, LayoutError, ReferenceError: as in `run`.
    """
    if not config.dpo.needs_reference:
        raise ConfigError(f"--only-reference: dpo.kind {config.dpo.kind} needs no reference")
    if config.dpo.reference_cache is None:
        raise ConfigError("--only-reference: give dpo.reference_cache, the directory that the log-probs go to")
    directory = Path(config.dpo.reference_cache)
    groups, architecture = training_run.join(config)
    run = Run("dpo", config, groups, RunDirectory(directory), architecture)
    items, pad_id = training_run.load_items(run, config.data.path)  # by path: without a preview
    items = [*items, *mismatched_items(run, config, items)]
    add_reference(run, config, reference_model(config, groups, architecture), items, pad_id, directory)
    run.say(f"reference log-probs of {len(items)} items are in {directory}")
    return directory


def reference_model(config: DpoConfig, groups: Groups, architecture: Architecture) -> Runner:
    """A frozen copy of the model at `model.path`."""
    return Runner.create(
        load_model(config.model, groups, architecture),
        groups,
        architecture,
        split=config.parallel.context_split,
        strategy=config.model.attention_strategy,
    )


def mismatched_items(run: Run, config: DpoConfig, items: list[Item]) -> list[Item]:
    """The answers on which kto's baseline is estimated, if it is; they fit into the packs as the others do."""
    if not config.dpo.kl_estimate:
        return []
    multiple = row_multiple(run.groups.layout, config.parallel.context_split)
    rows = config.train.pack_rows // multiple * multiple
    found = kto_baseline.mismatched(items, min(config.data.max_length, rows))
    run.say(f"kto's baseline is estimated on {len(found)} of {len(items)} prompts with the answer of another row")
    return found


def pack_options(config: DpoConfig, pad_id: int) -> reference.PackOptions:
    """Passes that only read log-probs are packed as training is."""
    return reference.PackOptions(config.train.pack_rows, config.train.prefix_sharing, pad_id)


def add_reference(
    run: Run, config: DpoConfig, runner: Runner, items: list[Item], pad_id: int, directory: Path
) -> list[Item]:
    """The pairs with the log-probs of the model in `runner`, which is that of `model.path`."""
    model = config.model
    with run.progress("reference log-probs", len(items)) as progress:
        return reference.attach_reference(
            items,
            runner,
            directory=directory,
            fingerprint=reference.weights_fingerprint(Path(model.path), run.groups, dtype=model.precision),
            options=pack_options(config, pad_id),
            tolerance=TOLERANCE[config.model.dtype],
            seed=config.run.seed,
            on_progress=lambda done: progress.update(done),
        )


def batch_loss(
    run: Run, config: DpoConfig, data: StepData, names: Sequence[str] = (), kl: float | None = None
) -> LossFn:
    """The loss of one global batch: the mean over its pairs or labelled answers.

    Args:
        kl: kto's baseline where it is estimated.
    """
    group = run.groups.pg.cp if run.groups.cp_size > 1 else None

    def loss(output: TokenLogprobs, batch: RankBatch) -> Terms:
        pack = batch.batch
        # An empty pack has no columns, and a reference-free loss does not need this one.
        none_Q = output.logprobs_K.new_zeros(pack.num_sequences)
        labels = config.dpo.records == "labels"
        return preference_terms(
            output.logprobs_K,
            sequence_id_K=own_targets(pack.sequence_id_K, batch),
            pairs_P2=labelled_pairs(pack.per_sequence.get(LABEL, none_Q)) if labels else pack.pairs_P2,
            reference_sums_Q=pack.per_sequence.get(reference.COLUMN, none_Q),
            lengths_Q=sequence_lengths(pack.sequence_id_K, pack.num_sequences),
            global_pairs=data.num_items_global,
            beta=config.dpo.beta,
            weights_Q=None if config.dpo.weight_field is None else pack.per_sequence.get(WEIGHT, none_Q),
            alignment_K=output.alignment_K,
            unpaired=labels,
            estimated_kl=kl,
            cp_group=group,
            sources=pack.sources,
            source_names=names,
            **loss_options(config),
        )

    return loss


def loss_options(config: DpoConfig) -> dict[str, Any]:
    """The arguments of `kernels.preference_loss` that the configuration gives, beta aside."""
    return {
        "kind": config.dpo.kind,
        "label_smoothing": config.dpo.label_smoothing,
        "gamma": config.dpo.gamma,
        "sft_weight": config.dpo.sft_weight,
        "weighting": config.dpo.weighting,
        "kl": config.dpo.kl_baseline,
        "desirable_weight": config.dpo.desirable_weight,
        "undesirable_weight": config.dpo.undesirable_weight,
    }
