"""Prove that a configuration (model, layout, data) computes what Hugging Face computes in one process."""

from __future__ import annotations

import importlib.metadata
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import ConfigError, dump_yaml
from tulu_hpc.config.run_directory import RunDirectory
from tulu_hpc.config.schema import DpoConfig, RewardModelConfig, RlvrConfig, SftConfig
from tulu_hpc.config.sections import ModelSection
from tulu_hpc.config.verbs import TrainingConfig
from tulu_hpc.data.loader import ItemLoader, StepData
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.data.readout import with_readout
from tulu_hpc.data.tokenizer import load_tokenizer, padding_id
from tulu_hpc.diagnostics import compare, hugging_face
from tulu_hpc.diagnostics.certificate import Certificate, Check, Difference
from tulu_hpc.diagnostics.hugging_face import Truth
from tulu_hpc.models.convert import copy_companions, iter_hf_tensors, write_config
from tulu_hpc.models.model_files import is_imported
from tulu_hpc.models.names import SCORE, hf_shapes
from tulu_hpc.models.safetensors_files import HfDirectory, published, write_shards
from tulu_hpc.models.scalar_head import Head, new_head_weight
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.failures import shared_writing
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.stages import audit_rlvr, dpo, reward_model, rlvr, rlvr_loss, sft, training_run
from tulu_hpc.stages.audit_losses import pair_loss, score_loss, sft_loss
from tulu_hpc.stages.training_data import kind_of, read_items, weight_field_of
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training import reference
from tulu_hpc.training.normalisation import global_counts
from tulu_hpc.training.runner import LossFn, row_multiple
from tulu_hpc.training.trainer import Trainer, build_trainer

AuditedConfig = TrainingConfig


@dataclass(frozen=True)
class Tolerances:
    """Largest differences that pass; Hugging Face always runs in fp32.

    hidden: of max|truth| per stage. logprobs: absolute, nats. loss: relative. gradients: per tensor, relative.
    gradient_measure: "max" or "norm" (`compare.gradient_differences`).
    """

    hidden: float
    logprobs: float
    loss: float
    gradients: float
    gradient_measure: str


# fp32: rounding through a few dozen layers, a hundred times less than the smallest fault. bf16: 8 bits per number,
# random in sign, so that norms say more than extremes.
TOLERANCES = {
    "float32": Tolerances(hidden=1e-4, logprobs=2e-4, loss=1e-5, gradients=2e-4, gradient_measure="max"),
    "bfloat16": Tolerances(hidden=6e-2, logprobs=0.5, loss=2e-2, gradients=0.1, gradient_measure="norm"),
}


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
    if is_imported(Path(config.model.path)):
        raise ConfigError(f"model.path: {config.model.path} is an imported checkpoint; the audit needs what it is of")
    if config.model.fp8 != "none" and dtype != "bfloat16":
        raise ConfigError(f"model.fp8 is {config.model.fp8}: audit with --dtype config, fp8 needs bfloat16 around it")
    model = config.model.model_copy(update={"dtype": dtype})
    groups, architecture = training_run.join(config.model_copy(update={"model": model}))
    if layers is not None and layers < architecture.num_hidden_layers:
        model, architecture = first_layers(model, architecture, layers, output / "model", groups)
    audited = comparable(config.model_copy(update={"model": model}))
    run = Run("audit", audited, groups, RunDirectory(output), architecture)
    items, pad_id = sample(run, audited, rows, max_tokens)
    truth = one_process_truth(run, audited, items)
    if isinstance(audited, RlvrConfig):
        items = audit_rlvr.with_logprobs(audited, items, truth)
    trainer = audited_trainer(run, audited)
    data = one_batch(run, audited, items, pad_id)
    checks = list(compared(run, audited, trainer, data, truth, TOLERANCES[dtype]))
    certificate = Certificate(
        subject=subject(run, audited, items, data, dtype),
        versions=_versions(),
        checks=checks,
        config=dump_yaml(audited),
    )
    certificate = groups.broadcast_object(certificate if groups.is_main else None)
    with shared_writing(groups, f"the certificate ({output})"):
        if groups.is_main:
            if layers is not None:
                shutil.rmtree(output / "model", ignore_errors=True)
            certificate.write(output)
    return certificate


def comparable(config: AuditedConfig) -> AuditedConfig:
    """The file without what Hugging Face's side has no counterpart of: drawn noise, gradients below the dtype."""
    changes: dict[str, Any] = {}
    if config.model.dtype == "float32":
        changes["optimizer"] = config.optimizer.model_copy(update={"gradient_dtype": "float32"})
    if isinstance(config, SftConfig):
        changes["sft"] = config.sft.model_copy(update={"neftune_alpha": 0.0})
    return config.model_copy(update=changes)


def first_layers(
    model: ModelSection, architecture: Architecture, layers: int, target: Path, groups: Groups
) -> tuple[ModelSection, Architecture]:
    """A copy of the model's first layers, with embedding, final norm and head, at `target`."""
    short = architecture.model_copy(update={"num_hidden_layers": layers})
    with shared_writing(groups, f"the model's first layers ({target})"):
        if groups.is_main:
            _write_first_layers(Path(model.path), short, target)
    return model.model_copy(update={"path": str(target), "architecture": None}), short


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
    """Computed by global rank 0; the others get all but the gradients."""
    truth: Truth | None = None
    if run.groups.is_main:
        if isinstance(config, SftConfig):
            loss = sft_loss(config, items)
        elif isinstance(config, RlvrConfig):
            loss = audit_rlvr.policy_loss(config, items)
        else:
            loss = pair_loss(config, items) if isinstance(config, DpoConfig) else score_loss(items)
        truth = hugging_face.compute(
            Path(config.model.path),
            items,
            loss,
            default_device(),
            scores=isinstance(config, RewardModelConfig),
            new_score=drawn_tensors(run, config).get(SCORE),
            temperature=config.rollout.temperature if isinstance(config, RlvrConfig) else 1.0,
        )
    shared = run.groups.broadcast_object(None if truth is None else replace(truth, gradients={}))
    assert isinstance(shared, Truth)
    return truth or shared


def drawn_tensors(run: Run, config: AuditedConfig) -> dict[str, Tensor]:
    """What training draws by the seed because `model.path` lacks it: the head of a new reward model."""
    if not isinstance(config, RewardModelConfig):
        return {}
    directory = HfDirectory(config.model.path)
    has_head = SCORE in directory.file_of
    directory.close()
    return {} if has_head else {SCORE: new_head_weight(run.architecture.hidden_size, config.run.seed)}


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


def one_batch(run: Run, config: AuditedConfig, items: list[Item], pad_id: int) -> StepData:
    """All samples as one global batch, packed and dealt as training would."""
    return ItemLoader(
        items,
        global_batch_size=len(items),
        seed=config.run.seed,
        steps=1,
        shuffle=False,
        dp_rank=run.groups.dp_rank,
        dp_size=run.groups.dp_size,
        pack_rows=config.train.pack_rows,
        multiple=row_multiple(run.groups.layout, config.parallel.context_split),
        share=config.train.prefix_sharing,
        pad_id=pad_id,
        cost=training_run.item_cost(run.architecture, share=config.train.prefix_sharing),
    ).next_step()


def compared(
    run: Run, config: AuditedConfig, trainer: Trainer, data: StepData, truth: Truth, allowed: Tolerances
) -> list[Check]:
    """Every check, in the order in which a fault shows. Complete on global rank 0. Collective."""
    groups, architecture = run.groups, run.architecture
    stored = iter_hf_tensors(trainer.models, architecture, groups)
    weights = compare.weight_differences(stored, config.model.path, drawn_tensors(run, config))
    layers = architecture.num_hidden_layers
    with compare.captured(trainer.models, layers) as outputs:
        scores = isinstance(config, RewardModelConfig)
        logprobs = trainer.runner.values(data.packs) if scores else trainer.runner.logprobs(data.packs)
    batches = trainer.runner.prepare(data.packs)
    hidden = compare.hidden_differences(
        outputs,
        batches,
        truth,
        groups,
        layers=layers,
        sequence_parallel=groups.layout.sequence_parallel,
    )
    scored = compare.logprob_differences(data.packs, logprobs, truth, groups)
    loss_fn: LossFn
    if isinstance(config, SftConfig):
        loss_fn = sft.batch_loss(run, config, data)
    elif isinstance(config, DpoConfig):
        loss_fn = dpo.batch_loss(run, config, data)
    elif isinstance(config, RlvrConfig):
        loss_fn = rlvr_loss.policy_loss(config, groups, global_counts(data.packs, groups))
    else:
        loss_fn = reward_model.batch_loss(run, data, ())
    trainer.zero_grad()
    terms = trainer.runner.forward_backward(batches, loss_fn)
    loss = global_loss(groups, terms, whole_on_every_context_rank=isinstance(config, DpoConfig | RewardModelConfig))
    with compare.gradients_as_parameters(trainer.chunks, groups):
        stream = iter_hf_tensors(trainer.models, architecture, groups)
        gradients, remark = compare.gradient_differences(stream, truth, measure=allowed.gradient_measure)
    relative = abs(loss - truth.loss) / max(abs(truth.loss), 1e-30)
    measure = "max|d| / max|truth|" if allowed.gradient_measure == "max" else "|d| / |truth|"
    return [
        Check("weights", "max|d|", 0.0, weights),
        Check("hidden", "max|d| / max|truth|", allowed.hidden, hidden),
        Check("scores" if scores else "logprobs", "max|d|" if scores else "max|d|, nats", allowed.logprobs, scored),
        Check("loss", "|d| / |truth|", allowed.loss, [Difference(f"the batch ({loss:.6g})", relative)], remark),
        Check("gradients", measure, allowed.gradients, gradients, remark),
    ]


def global_loss(groups: Groups, terms: Sequence[Terms], *, whole_on_every_context_rank: bool) -> float:
    """Sum over micro-batches and ranks of what each contributes to the loss."""
    counts = groups.is_last_stage and groups.tp_rank == 0 and (groups.cp_rank == 0 or not whole_on_every_context_rank)
    mine = sum(float(each.loss) for each in terms) if counts else 0.0
    total = torch.tensor(mine, dtype=torch.float64, device=default_device())
    if groups.world_size > 1:
        dist.all_reduce(total)
    return float(total)


def subject(run: Run, config: AuditedConfig, items: Sequence[Item], data: StepData, dtype: str) -> dict[str, Any]:
    """What the certificate is about. Collective."""
    fingerprint = reference.weights_fingerprint(Path(config.model.path), run.groups, dtype=dtype)
    groups = run.groups
    counts = groups.tp_rank == groups.cp_rank == groups.pp_rank == 0  # a replica's other ranks have the same packs
    packs = sum(groups.all_gather_object(len(data.packs) if counts else 0))
    device = default_device()
    parallel = config.parallel
    layout = (
        f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, virtual {parallel.virtual_pipeline or 1}, context "
        f"{parallel.context}, sequence parallel {parallel.sequence_parallel}, data {run.groups.dp_size}"
    )
    return {
        "model": config.model.path,
        "model_hash": fingerprint,
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
