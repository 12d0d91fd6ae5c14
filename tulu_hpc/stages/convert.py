"""Hugging Face directory to checkpoint and back, and the comparison of any two models in files; one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tulu_hpc.config.loader import ConfigError, load_config, read_yaml
from tulu_hpc.config.run_directory import RESOLVED_CONFIG
from tulu_hpc.config.verbs import SCHEMAS, TRAINING_VERBS, TrainingConfig
from tulu_hpc.models.comparison import compare
from tulu_hpc.models.conversion import export_hf, import_hf
from tulu_hpc.models.conversion_job import ConversionError
from tulu_hpc.models.model_files import Model, open_model
from tulu_hpc.stages.model_source import Source, find_source
from tulu_hpc.stages.training_run import exported_template
from tulu_hpc.telemetry.progress import Progress
from tulu_hpc.training.trainer import DTYPES

Dtype = Literal["float32", "bfloat16"]


def import_model(source: Path, target: Path, *, dtype: Dtype | None, max_shard_gb: float, workers: int) -> None:
    """Write a Hugging Face directory as a checkpoint that training starts from (`model.path`).

    Raises:
        ValueError: naming what is wrong with the source, or that the target exists.
    """
    _check_workers(workers, max_shard_gb)
    _check_apart(source, target)
    started = time.perf_counter()
    record = import_hf(
        source,
        target,
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_bytes=max_shard_gb * 1e9,
        workers=workers,
        done=_shown("convert import"),
    )
    _say_written(record["tensors"], target, time.perf_counter() - started)


def export_model(source: Path, target: Path, *, dtype: Dtype | None, max_shard_gb: float, workers: int) -> None:
    """Write a checkpoint (of a run: its newest one, or the one given; or imported) as a Hugging Face directory.

    Args:
        dtype: of the written weights; None: of a run its `model.dtype`, also where `model.fp32_head` keeps a part of it
            in fp32; else that of the source.

    Raises:
        ValueError: naming what is wrong with the source, or that the target exists.
    """
    _check_workers(workers, max_shard_gb)
    _check_apart(source, target)
    started = time.perf_counter()
    found = find_source(source, "model")
    config = _config_of_run(found)
    dtype = dtype if config is None else dtype or config.model.dtype
    record = export_hf(
        found.checkpoint or found.base,
        target,
        base=found.base,
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_bytes=max_shard_gb * 1e9,
        workers=workers,
        # Where it is not the tokenizer's own.
        chat_template=None if config is None else exported_template(config),
        done=_shown("convert export"),
    )
    _say_written(record["tensors"], target, time.perf_counter() - started)


def verify_models(left: Path, right: Path, *, dtype: Dtype | None, workers: int) -> None:
    """Compare two models, each a Hugging Face directory, a run, one of its checkpoints or an imported one.

    Raises:
        ConversionError: they differ; the first differing tensor is named. Or one is not what its own record says.
    """
    _check_workers(workers, 1.0)
    started = time.perf_counter()
    a, b = _open(left), _open(right)
    progress = Progress("convert verify", max(len(a.tensors), len(b.tensors)))
    differing = compare(
        a, b, dtype=None if dtype is None else DTYPES[dtype], workers=workers, done=lambda count: progress.update(count)
    )
    if differing:
        raise ConversionError(
            f"{left} and {right} differ in {len(differing)} of {len(a.tensors)} tensors, "
            f"the first: {differing[0].name}: {differing[0].what}"
        )
    size = sum(tensor.nbytes for model in (a, b) for tensor in model.tensors.values())
    print(f"the same: {len(a.tensors)} tensors, {size / 1e9:.2f} GB read in {time.perf_counter() - started:.3f} s")


def _open(path: Path) -> Model:
    found = find_source(path, "model")
    return open_model(found.checkpoint or found.base, found.base)


def _config_of_run(source: Source) -> TrainingConfig | None:
    """The configuration of the run that a checkpoint belongs to; None: it was imported."""
    if source.checkpoint is None:
        return None
    file = source.checkpoint.parent.parent / RESOLVED_CONFIG
    data = read_yaml(file)
    verb = next((name for name in TRAINING_VERBS if name in data), TRAINING_VERBS[0])
    config = load_config(file, (), SCHEMAS[verb])
    assert isinstance(config, TrainingConfig)
    return config


def _check_workers(workers: int, max_shard_gb: float) -> None:
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    if not max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb {max_shard_gb}: must be positive")


def _check_apart(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target}: source and target are the same directory")


def _shown(title: str) -> Callable[[int, bool], None]:
    kept = 0

    def done(count: int, was_kept: bool) -> None:
        nonlocal kept
        kept += was_kept
        print(f"{title}: {count} files done" + (f", {kept} of them by an earlier start" if kept else ""), flush=True)

    return done


def _say_written(tensors: dict[str, object], target: Path, seconds: float) -> None:
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {len(tensors)} tensors, {size / 1e9:.2f} GB in {seconds:.3f} s ({size / 1e9 / seconds:.2f} GB/s)")
