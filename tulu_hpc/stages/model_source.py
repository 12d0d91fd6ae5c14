"""Opening a model to sample from: a Hugging Face directory, or a run or checkpoint of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.run_directory import RESOLVED_CONFIG
from tulu_hpc.config.sections import ModelSection, ParallelSection, RunSection
from tulu_hpc.data.tokenizer import load_tokenizer
from tulu_hpc.models.transformer_engine import check_layers
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.stages.training_run import read_architecture
from tulu_hpc.training import checkpoint, determinism, reference
from tulu_hpc.training.trainer import load_model
from tulu_hpc.training.weights import load_weights


@dataclass(frozen=True)
class Source:
    """Where a model's parts come from.

    Attributes:
        base: Hugging Face directory with shape and tokenizer, and with the weights if there is no checkpoint.
        checkpoint: directory `step_N` with the weights, or None.
    """

    base: Path
    checkpoint: Path | None

    @property
    def kind(self) -> str:
        return "checkpoint" if self.checkpoint else "huggingface"


@dataclass(frozen=True)
class OpenModel:
    """A model on this process, ready to generate."""

    groups: Groups
    architecture: Architecture
    chunks: list[nn.Module]
    tokenizer: Any
    source: Source
    fingerprint: str

    def say(self, text: str) -> None:
        """Print once per job."""
        if self.groups.is_main:
            print(text, flush=True)


def find_source(path: str | Path, what: str = "model.path") -> Source:
    """Tell a Hugging Face directory from a run directory (its newest checkpoint is taken) and a single checkpoint.

    Args:
        what: the path is, for errors.

    Raises:
        ConfigError: it is none of these, or the run has no checkpoint yet.
    """
    given = Path(path)
    if (given / "config.json").is_file():
        return Source(given, None)
    if (given / checkpoint.MANIFEST).is_file() and given.parent.name == "checkpoints":
        run_dir, step = given.parent.parent, given
    elif (given / RESOLVED_CONFIG).is_file():
        steps = checkpoint.valid_steps(given / "checkpoints")
        if not steps:
            raise ConfigError(f"{what} {given}: this run has no checkpoint yet")
        run_dir, step = given, given / "checkpoints" / f"step_{steps[-1]}"
    else:
        raise ConfigError(
            f"{what} {given}: neither a Hugging Face directory (config.json), a run directory ({RESOLVED_CONFIG}) "
            f"nor one of its checkpoints (checkpoints/step_N)"
        )
    return Source(_base_of_run(run_dir), step)


def open_model(run: RunSection, model: ModelSection, parallel: ParallelSection, *, served: bool = False) -> OpenModel:
    """Start the process groups and load the model; collective.

    Args:
        served: rollout servers will read the model's files, so a Hugging Face directory is not loaded here.

    Raises:
        ConfigError: naming the key, or a damaged checkpoint.
        LayoutError: the number of processes does not fit the layout.
        LayerSpecError: Transformer Engine's layers are asked for and cannot be imported.
    """
    determinism.configure(deterministic=run.deterministic, threads=run.threads)
    check_layers(model.layer_spec)
    groups = initialize(layout_of(parallel), seed=run.seed, timeout_minutes=run.distributed_timeout_minutes)
    source = find_source(model.path)
    based = model.model_copy(update={"path": str(source.base)})
    architecture = read_architecture(based)
    chunks: list[nn.Module] = []
    if source.checkpoint is not None or not served:
        chunks = load_model(based, groups, architecture, load_weights=source.checkpoint is None)
    if source.checkpoint is None:
        fingerprint = reference.weights_fingerprint(source.base, groups, dtype=model.precision)
    else:
        problem = checkpoint.verify(source.checkpoint, groups)
        if problem is not None:
            raise ConfigError(f"model.path {model.path}: damaged checkpoint: {problem}")
        load_weights(chunks, source.checkpoint)
        fingerprint = checkpoint.fingerprint(source.checkpoint)
    tokenizer = load_tokenizer(source.base, architecture.vocab_size)
    return OpenModel(groups, architecture, chunks, tokenizer, source, fingerprint)


def _base_of_run(run_dir: Path) -> Path:
    """The Hugging Face directory that a run started from, by its resolved configuration."""
    import yaml

    file = run_dir / RESOLVED_CONFIG
    if not file.is_file():
        raise ConfigError(f"{file}: not found; the checkpoint's run directory must have it")
    found = (yaml.safe_load(file.read_text(encoding="utf-8")).get("model") or {}).get("path")
    if not isinstance(found, str):
        raise ConfigError(f"{file}: has no model.path")
    return Path(found)
