"""Prove that a configuration (model, layout, data) computes what Hugging Face computes in one process."""

from __future__ import annotations

import importlib.metadata
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import ConfigError, dump_yaml
from tulu_hpc.config.run_directory import RunDirectory
from tulu_hpc.config.schema import DpoConfig, RewardModelConfig, RlvrConfig, SftConfig
from tulu_hpc.config.sections import ModelSection
from tulu_hpc.config.verbs import TrainingConfig
from tulu_hpc.data.loader import StepData
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.data.readout import with_readout
from tulu_hpc.data.tokenizer import load_tokenizer, padding_id
from tulu_hpc.diagnostics import hugging_face
from tulu_hpc.diagnostics.certificate import Certificate, Check
from tulu_hpc.diagnostics.hugging_face import Truth
from tulu_hpc.models.convert import copy_companions, write_config
from tulu_hpc.models.model_files import is_imported
from tulu_hpc.models.names import SCORE, hf_shapes
from tulu_hpc.models.safetensors_files import HfDirectory, published, write_shards
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.failures import shared_writing
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.stages import audit_rlvr, dpo, reward_model, rlvr, rlvr_loss, sft, training_run
from tulu_hpc.stages.audit_losses import pair_loss, score_loss, sft_loss
from tulu_hpc.stages.audit_model import (
    TOLERANCES,
    AuditedModel,
    Tolerances,
    compared,
    drawn_head,
    one_batch,
    shared_truth,
)
from tulu_hpc.stages.audit_values import value_checks
from tulu_hpc.stages.training_data import kind_of, read_items, weight_field_of
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training import reference
from tulu_hpc.training.normalisation import global_counts
from tulu_hpc.training.runner import LossFn
from tulu_hpc.training.trainer import Trainer, build_trainer

AuditedConfig = TrainingConfig


def run(
    config: AuditedConfig,
    *,
    output: Path,
    rows: int = 8,
    max_tokens: int = 512,
    layers: int | None = None,
    dtype: str = "float32",
) -> Certificate:
    """Audit a training file on this machine, at its layout (start it under torchrun as the training itself).

    Args:
        output: directory of `audit.json` and `audit.html`.
        rows: samples of the data.
        max_tokens: samples are cut to this length.
        layers: audit only the first layers of the model, where the whole one does not fit one process.
        dtype: of our side; the truth is computed in fp32.

    Raises:
        ConfigError, RecordError, LayoutError: naming the key, file, line or rank.
    """
    if isinstance(config, RlvrConfig):
        audit_rlvr.check(config, dtype)
    for key, model in audited_models(config).items():
        if is_imported(Path(model.path)):
            raise ConfigError(f"{key}.path: {model.path} is an imported checkpoint; the audit needs what it is of")
        if model.fp8 != "none" and dtype != "bfloat16":
            raise ConfigError(f"{key}.fp8 is {model.fp8}: audit with --dtype config, fp8 needs bfloat16 around it")
    groups, _ = training_run.join(with_models(config, {"model": {"dtype": dtype}}))
    changes: dict[str, dict[str, Any]] = {}
    for key, model in audited_models(config).items():
        changes[key] = {"dtype": dtype}
        if layers is not None and layers < training_run.read_architecture(model).num_hidden_layers:
            changes[key] |= {"path": str(first_layers(model, layers, output / key, groups)), "architecture": None}
    audited = comparable(with_models(config, changes))
    run = Run("audit", audited, groups, RunDirectory(output), training_run.read_architecture(audited.model))
    items, pad_id = sample(run, audited, rows, max_tokens)
    truth = one_process_truth(run, audited, items)
    if isinstance(audited, RlvrConfig):
        items = audit_rlvr.with_logprobs(audited, items, truth)
    data = one_batch(items, audited, audited.parallel, groups, run.architecture, pad_id)
    checks = trained_model_checks(run, audited, data, truth, TOLERANCES[dtype])
    if isinstance(audited, RlvrConfig) and audited.value is not None:
        checks += value_checks(run, audited, items, pad_id, TOLERANCES[dtype])
    certificate = Certificate(
        subject=subject(run, audited, items, data, dtype),
        versions=_versions(),
        checks=checks,
        config=dump_yaml(audited),
    )
    certificate = groups.broadcast_object(certificate if groups.is_main else None)
    with shared_writing(groups, f"the certificate ({output})"):
        if groups.is_main:
            for key, change in changes.items():
                if "path" in change:
                    shutil.rmtree(output / key, ignore_errors=True)
            certificate.write(output)
    return certificate


def audited_models(config: AuditedConfig) -> dict[str, ModelSection]:
    """What is compared, by key of the file."""
    models = {"model": config.model}
    if isinstance(config, RlvrConfig) and config.value is not None:
        models["value.model"] = config.value.model
    return models


def with_models(config: AuditedConfig, changes: Mapping[str, Mapping[str, Any]]) -> AuditedConfig:
    """The file with changes to sections of `audited_models`."""
    models = {key: model.model_copy(update=changes.get(key, {})) for key, model in audited_models(config).items()}
    update: dict[str, Any] = {"model": models["model"]}
    if isinstance(config, RlvrConfig) and config.value is not None:
        update["value"] = config.value.model_copy(update={"model": models["value.model"]})
    return config.model_copy(update=update)


def comparable(config: AuditedConfig) -> AuditedConfig:
    """The file without what Hugging Face's side has no counterpart of: drawn noise, gradients below the dtype."""
    changes: dict[str, Any] = {}
    if config.model.dtype == "float32":
        changes["optimizer"] = config.optimizer.model_copy(update={"gradient_dtype": "float32"})
        if isinstance(config, RlvrConfig) and config.value is not None:
            optimizer = config.value.optimizer.model_copy(update={"gradient_dtype": "float32"})
            changes["value"] = config.value.model_copy(update={"optimizer": optimizer})
    if isinstance(config, SftConfig):
        changes["sft"] = config.sft.model_copy(update={"neftune_alpha": 0.0})
    return config.model_copy(update=changes)


def first_layers(model: ModelSection, layers: int, target: Path, groups: Groups) -> Path:
    """A copy of the model's first layers, with embedding, final norm and head, at `target`."""
    short = training_run.read_architecture(model).model_copy(update={"num_hidden_layers": layers})
    with shared_writing(groups, f"the model's first layers ({target})"):
        if groups.is_main:
            _write_first_layers(Path(model.path), short, target)
    return target


def _write_first_layers(source: Path, short: Architecture, target: Path) -> None:
    directory = HfDirectory(source)
    head: Head = "value" if SCORE in directory.file_of else "logprobs"
    shapes = hf_shapes(short, head)
    some = next(iter(shapes))
    dtype = directory.read(some, tuple(slice(0, 1) for _ in shapes[some])).dtype
    stream = ((name, directory.read(name, tuple(slice(0, n) for n in shape))) for name, shape in shapes.items())
    with published(target) as staging:
        write_shards(stream, staging, shapes, dtype, 5e9)
        write_config(staging, short, dtype, source=source, head=head)
        copy_companions(source, staging)
    directory.close()


def sample(run: Run, config: AuditedConfig, rows: int, max_tokens: int) -> tuple[list[Item], int]:
    """A seeded choice of the data, renamed to its number in the audit; dpo gets reference log-probs of its own.

    These are drawn, not computed: a policy beside itself would have a loss that many faults leave alone.
    """
    tokenizer = load_tokenizer(config.model.path, run.architecture.vocab_size)
    pad_id = padding_id(tokenizer)
    if isinstance(config, RlvrConfig):
        return audit_rlvr.sample_answers(config, tokenizer, rows, max_tokens, run.say), pad_id
    short = config.data.model_copy(update={"max_length": min(config.data.max_length, max_tokens)})
    items, _ = read_items(short, tokenizer, kind_of(config), run.say, weight_field=weight_field_of(config))
    generator = random.Random(config.run.seed)
    chosen = generator.sample(range(len(items)), min(rows, len(items)))
    named = [replace(items[index], id=f"{number} ({items[index].id})") for number, index in enumerate(chosen)]
    if isinstance(config, DpoConfig):
        for item in named:
            lengths = [len(hugging_face.scored_positions(item, i)) for i in range(len(item.responses))]
            item.per_sequence[reference.COLUMN] = [-n * generator.uniform(1.0, 3.0) for n in lengths]
    if isinstance(config, RewardModelConfig):
        named = [with_readout(item) for item in named]
    return named, pad_id


def one_process_truth(run: Run, config: AuditedConfig, items: Sequence[Item]) -> Truth:
    """Of the model that the file trains."""

    def compute() -> Truth:
        if isinstance(config, SftConfig):
            loss = sft_loss(config, items)
        elif isinstance(config, RlvrConfig):
            loss = audit_rlvr.policy_loss(config, items)
        else:
            loss = pair_loss(config, items) if isinstance(config, DpoConfig) else score_loss(items)
        return hugging_face.compute(
            Path(config.model.path),
            items,
            loss,
            default_device(),
            scores=isinstance(config, RewardModelConfig),
            new_score=drawn_tensors(run, config).get(SCORE),
            temperature=config.rollout.temperature if isinstance(config, RlvrConfig) else 1.0,
        )

    return shared_truth(run.groups, compute)


def drawn_tensors(run: Run, config: AuditedConfig) -> dict[str, Tensor]:
    """What training draws by the seed because `model.path` lacks it: the head of a new reward model."""
    if not isinstance(config, RewardModelConfig):
        return {}
    return drawn_head(config.model.path, run.architecture.hidden_size, config.run.seed)


def audited_trainer(run: Run, config: AuditedConfig) -> Trainer:
    """As training builds it."""
    trainer = build_trainer(
        model=config.model,
        parallel=config.parallel,
        optimizer=config.optimizer,
        recompute=config.train.recompute,
        total_steps=1,
        groups=run.groups,
        architecture=run.architecture,
        head="value" if isinstance(config, RewardModelConfig) else "logprobs",
        new_head_seed=config.run.seed,
    )
    if isinstance(config, DpoConfig):
        dpo.prepare(config, trainer)
    if isinstance(config, RlvrConfig):
        rlvr.sample_as_rollouts(config, trainer.models)
    return trainer


def trained_model_checks(
    run: Run, config: AuditedConfig, data: StepData, truth: Truth, allowed: Tolerances
) -> list[Check]:
    """Of the model that the file trains. Complete on global rank 0. Collective."""
    trainer, groups = audited_trainer(run, config), run.groups
    loss_fn: LossFn
    if isinstance(config, SftConfig):
        loss_fn = sft.batch_loss(run, config, data)
    elif isinstance(config, DpoConfig):
        loss_fn = dpo.batch_loss(run, config, data)
    elif isinstance(config, RlvrConfig):
        loss_fn = rlvr_loss.policy_loss(config, groups, global_counts(data.packs, groups))
    else:
        loss_fn = reward_model.batch_loss(run, data, ())
    answer: Literal["scores", "logprobs"] = "scores" if isinstance(config, RewardModelConfig) else "logprobs"
    drawn = drawn_tensors(run, config)
    model = AuditedModel(trainer, config.model.path, answer, drawn)
    pairs = isinstance(config, DpoConfig | RewardModelConfig)
    return compared(model, data, truth, loss_fn, allowed, whole_on_every_context_rank=pairs)


def subject(run: Run, config: AuditedConfig, items: Sequence[Item], data: StepData, dtype: str) -> dict[str, Any]:
    """What the certificate is about. Collective."""
    groups = run.groups
    counts = groups.tp_rank == groups.cp_rank == groups.pp_rank == 0  # a replica's other ranks have the same packs
    packs = sum(groups.all_gather_object(len(data.packs) if counts else 0))
    device = default_device()
    parallel = config.parallel
    layout = (
        f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, virtual {parallel.virtual_pipeline or 1}, context "
        f"{parallel.context}, sequence parallel {parallel.sequence_parallel}, data {run.groups.dp_size}"
    )
    about: dict[str, Any] = {}
    for key, model in audited_models(config).items():
        name = key.replace(".", "_")
        about[name] = model.path
        about[f"{name}_hash"] = reference.weights_fingerprint(Path(model.path), groups, dtype=dtype)
    return about | {
        "layers": run.architecture.num_hidden_layers,
        "layout": layout,
        "processes": run.groups.world_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "prefix_sharing": config.train.prefix_sharing,
        "recompute": config.train.recompute,
        "packs": packs,
        "scored_tokens": sum(len(hugging_face.scored_positions(i, r)) for i in items for r in range(len(i.responses))),
        "samples": [item.id for item in items],
    }


def _versions() -> dict[str, str]:
    names = ("tulu_hpc", "torch", "megatron-core", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}
