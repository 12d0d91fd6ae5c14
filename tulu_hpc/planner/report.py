"""The table that `tulu-hpc plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.layer_spec import row_step
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import DpoConfig, RewardModelConfig, RlvrConfig
from tulu_hpc.config.sections import ModelSection
from tulu_hpc.config.verbs import TrainingConfig
from tulu_hpc.parallel.layout import LayoutError, layout_of
from tulu_hpc.planner.hardware import GIB, RESERVED_BYTES, Gpu, find_gpu
from tulu_hpc.planner.memory import StageMemory, Workload, checkpoint_host_bytes, plan_memory


def workload(config: TrainingConfig, gpus: int | None = None) -> Workload:
    """What a configuration asks of `gpus` ranks (None: run.gpus, else one replica).

    Raises:
        ConfigError: the shape of a model is known from neither `model.architecture` nor `model.path`.
        LayoutError: the ranks cannot hold whole replicas.
    """
    architecture = _architecture(config.model, "model")
    layout = layout_of(config.parallel, row_step(config.model, config.parallel, config.train.pack_rows))
    copies, cache, value = 0, 0, None
    ranks = gpus or config.run.gpus or layout.model_parallel
    if isinstance(config, DpoConfig):
        copies = int(config.dpo.reference == "resident")
    if isinstance(config, RlvrConfig):
        copies = int(config.rlvr.kl_coef > 0)
        rollout = config.rollout
        cache = rollout.max_sequences * (config.data.max_length + rollout.max_new_tokens)
        value = _value_workload(config, ranks)
    return Workload(
        architecture=architecture,
        layout=layout,
        data=layout.data(ranks),
        rows=config.train.pack_rows,
        dtype_bytes=4 if config.model.dtype == "float32" else 2,
        gradient_bytes=4 if config.optimizer.gradient_dtype == "float32" else 2,
        distributed_optimizer=config.parallel.distributed_optimizer,
        moments=2 if config.optimizer.kind == "adamw" else 1,
        recompute=config.train.recompute,
        vocab_multiple=config.model.vocab_multiple,
        logprob_buffer_bytes=config.model.logprob_buffer_mib * 2**20,
        resident_copies=copies,
        cache_tokens=cache,
        fp32_head=config.model.fp32_head,
        head="value" if isinstance(config, RewardModelConfig) else "logprobs",
        value=value,
    )


def _value_workload(config: RlvrConfig, ranks: int) -> Workload | None:
    """PPO's value model over the same ranks."""
    section = config.value
    if section is None:
        return None
    parallel = section.parallel or config.parallel
    layout = layout_of(parallel, row_step(section.model, parallel, config.train.pack_rows))
    return Workload(
        architecture=_architecture(section.model, "value.model"),
        layout=layout,
        data=layout.data(ranks),
        rows=config.train.pack_rows,
        dtype_bytes=4 if section.model.dtype == "float32" else 2,
        gradient_bytes=4 if section.optimizer.gradient_dtype == "float32" else 2,
        distributed_optimizer=parallel.distributed_optimizer,
        moments=2 if section.optimizer.kind == "adamw" else 1,
        recompute=section.recompute,
        vocab_multiple=section.model.vocab_multiple,
        head="value",
    )


def _architecture(model: ModelSection, key: str) -> Architecture:
    if model.architecture is not None:
        return model.architecture
    try:
        return Architecture.from_hf(model.path)
    except ValueError as error:
        raise ConfigError(f"{key}.architecture is not given, and {error}") from error


def plan_text(config: TrainingConfig, *, gpu: str = "h100", gpus: int | None = None) -> tuple[str, bool]:
    """The whole text, and whether the run fits."""
    work = workload(config, gpus)
    device = find_gpu(gpu)
    layout, stages = work.layout, plan_memory(work)
    worst = max(stages, key=lambda stage: stage.total)
    ranks = layout.model_parallel * work.data
    lines = [
        f"{config.run.name}: {_parameters(work):,} parameters on {ranks} x {device.name}: "
        f"tensor {layout.tensor}{' (sequence)' if layout.sequence_parallel else ''}, pipeline {layout.pipeline}"
        f"{f' x {layout.virtual_pipeline} chunks' if layout.virtual_pipeline else ''}{_uneven(stages)}, "
        f"context {layout.context}, "
        f"data {work.data}; packs of {work.rows} rows, recompute {work.recompute}",
        *_beside(work),
        "",
        *_table(stages, worst),
        "",
    ]
    fits = worst.total + RESERVED_BYTES <= device.memory_bytes
    lines += _verdict(work, worst, device, fits)
    if config.train.async_save:
        held = max(checkpoint_host_bytes(work, stage.stage) for stage in stages) / GIB
        if work.value is not None:
            held += max(checkpoint_host_bytes(work.value, stage) for stage in range(work.value.layout.pipeline)) / GIB
        lines.append(f"host memory while a checkpoint is written: {held:.1f} GiB per rank of the first replica")
    return "\n".join(lines), fits


def _beside(work: Workload) -> list[str]:
    if work.value is None:
        return []
    layout = work.value.layout
    return [
        f"value model: {_parameters(work.value):,} parameters, tensor {layout.tensor}, pipeline {layout.pipeline}, "
        f"context {layout.context}, data {work.value.data}, recompute {work.value.recompute}"
    ]


def _uneven(stages: list[StageMemory]) -> str:
    """Layers per stage where they differ: ` of 5 + 6 x 14 + 3 layers`."""
    layers = [sum(stage.layers) for stage in stages]
    if len(set(layers)) < 2:
        return ""
    runs = [(count, len(list(run))) for count, run in groupby(layers)]
    return f" of {' + '.join(f'{times} x {count}' if times > 1 else str(count) for count, times in runs)} layers"


def _parameters(work: Workload) -> int:
    """Of the whole model, vocabulary as given."""
    architecture = work.architecture
    if work.head == "logprobs":
        return architecture.parameter_count()
    untied = 0 if architecture.tie_word_embeddings else architecture.vocab_size
    return architecture.parameter_count() - (untied - 1) * architecture.hidden_size


def _table(stages: list[StageMemory], worst: StageMemory) -> list[str]:
    """One row per kind of stage: the first, the worst, the last; GiB per rank."""
    names = [name for name in worst.terms() if any(stage.terms()[name] for stage in stages)]
    heads = ["stage", "layers", "in flight", *names, "total"]
    shown = sorted({0, worst.stage, len(stages) - 1})
    rows = [heads]
    for stage in (stages[index] for index in shown):
        cells = [f"{value / GIB:.1f}" for name, value in stage.terms().items() if name in names]
        mark = " *" if stage is worst and len(stages) > 1 else ""
        rows.append(
            [
                f"{stage.stage}{mark}",
                str(sum(stage.layers)),
                f"{stage.in_flight:.3g}",
                *cells,
                f"{stage.total / GIB:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows] + [
        "GiB per rank"
        + ("; * the worst stage" if len(stages) > 1 else "")
        + ("; the cache lives while nothing is trained, so the larger of it and activations + logits counts"
           if "kv cache" in names else "")
    ]  # fmt: skip


def _verdict(work: Workload, worst: StageMemory, device: Gpu, fits: bool) -> list[str]:
    need, have = (worst.total + RESERVED_BYTES) / GIB, device.memory_bytes / GIB
    reserved = f"{RESERVED_BYTES / GIB:.0f} GiB for CUDA, NCCL and fragmentation"
    sentence = f"{worst.total / GIB:.1f} GiB + {reserved} = {need:.1f} GiB"
    if fits:
        return [f"fits: {sentence} of {have:.1f} GiB"]
    name, largest = max(worst.terms().items(), key=lambda term: term[1])
    lines = [
        f"does not fit: {sentence}, {need - have:.1f} GiB more than the {have:.1f} GiB of {device.name}",
        f"largest term: {name} with {largest / GIB:.1f} GiB (stage {worst.stage})",
    ]
    for change, other in _alternatives(work):
        try:
            total = max(stage.total for stage in plan_memory(other)) + RESERVED_BYTES
        except LayoutError:
            continue
        if total <= device.memory_bytes:
            lines.append(f"would fit: {change} ({total / GIB:.1f} GiB)")
    if len(lines) == 2:
        lines.append("no single change of recompute, tensor, pipeline, context, data or pack_rows makes it fit")
    return lines


def _alternatives(work: Workload) -> Iterator[tuple[str, Workload]]:
    layout, value = work.layout, work.value
    if work.recompute != "full":
        yield "train.recompute=full", replace(work, recompute="full")
    if work.dtype_bytes == 2 and work.gradient_bytes == 4:
        yield "optimizer.gradient_dtype=bfloat16", replace(work, gradient_bytes=2)
    rows = work.rows // 2
    yield (
        f"train.pack_rows={rows}",
        replace(work, rows=rows, value=None if value is None else replace(value, rows=rows)),
    )
    wider = None if value is None else replace(value, data=2 * value.data)  # of twice the GPUs
    for name in ("tensor", "pipeline", "context"):
        degree = 2 * getattr(layout, name)
        options = {name: degree, **({"sequence": True} if name == "tensor" else {})}
        other = replace(work, layout=replace(layout, **options), value=wider)
        yield f"parallel.{name}={degree}, with twice the GPUs", other
    gpus = 2 * work.data * layout.model_parallel
    yield f"--gpus {gpus} (data {2 * work.data})", replace(work, data=2 * work.data, value=wider)
    if value is not None and value.data % 2 == 0:
        degree = 2 * value.layout.tensor
        split = replace(value, layout=replace(value.layout, tensor=degree, sequence=True), data=value.data // 2)
        yield f"value.parallel.tensor={degree}", replace(work, value=split)
