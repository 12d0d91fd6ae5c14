"""Which files a step reads and writes, by its configuration; digests to see whether they changed; what it must not do.

`check_files` is called by every verb before it works: nothing that a step reads, and nothing that is not a product of
ours, is overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tulu_hpc.config import schema
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.curation.synthetic.dataset import EVALS, SOURCES

# A larger file is known by size and time of change: hashing 800 GB takes longer than it saves.
_HASHED_BYTES = 256 * 2**20
# What a model directory of ours holds; a directory with anything else in it is not replaced.
_MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja"),
    *("*.safetensors", "*.safetensors.index.json"),
)


def inputs_of(config: Any) -> list[Path]:
    """Local files and directories that the step reads (Hugging Face ids and files that are not there are left out)."""
    return [path for path in map(Path, dict.fromkeys([*_models_of(config), *_data_of(config)])) if path.exists()]


def _models_of(config: Any) -> list[str]:
    return [config.model.path] if hasattr(config, "model") else []


def _data_of(config: Any) -> list[str]:
    if isinstance(config, schema.RewardModelConfig):
        return [*config.data.path, *config.rm.eval_path]
    if isinstance(config, schema.StageConfig | schema.PreferConfig):
        return config.data.path
    if isinstance(config, schema.EvalConfig):
        tasks = [*config.eval.dev, *config.eval.unseen]
        return [*(task.path for task in tasks), *(t.few_shot_path for t in tasks if t.few_shot_path)]
    if isinstance(config, schema.MixConfig):
        return [source.path for source in config.mix.sources]
    if isinstance(config, schema.DecontaminateConfig):
        section = config.decontaminate
        names = [*(source.path for source in section.train), *(prompts.path for prompts in section.evals)]
        return [*names, *([section.planted] if section.planted else [])]
    if isinstance(config, schema.InitialiseConfig):
        return config.tokenizer.texts
    return []


def outputs_of(config: Any, options: Sequence[str] = ()) -> list[Path]:
    """What must be there when the step is done; `options` are those of the verb (`--unseen`, `--both`).

    A directory stands for all its files, where the step makes the whole of it.

    Raises:
        ValueError: a training step without run.dir, whose result no later step could find.
    """
    if isinstance(config, schema.StageConfig):
        if config.run.dir is None:
            raise ValueError("a training step of a recipe needs run.dir")
        run_dir = Path(config.run.dir)
        return [run_dir / "metrics.jsonl", *([run_dir / "hf"] if config.train.export_hf else [])]
    if isinstance(config, schema.EvalConfig):
        suites = {"--unseen": ["unseen"], "--both": ["dev", "unseen"]}.get(next(iter(options), ""), ["dev"])
        return [Path(config.eval.output) / f"{suite}.json" for suite in suites]
    if isinstance(config, schema.PreferConfig):
        return [Path(config.prefer.output), Path(f"{config.prefer.output}.stats.json")]
    if isinstance(config, schema.MixConfig):
        output = Path(config.mix.output)
        stem = output.name.removesuffix(".gz").removesuffix(".jsonl")
        return [output, output.with_name(f"{stem}.statistics.json")]
    if isinstance(config, schema.DecontaminateConfig):
        section = config.decontaminate
        names = [] if section.action == "report" else [f"{source.name}.jsonl" for source in section.train]
        return [Path(section.output) / name for name in [*names, "report.json"]]
    if isinstance(config, schema.SyntheticConfig):
        names = [*(f"raw/{name}.jsonl" for name in SOURCES), *(f"eval/{name}.jsonl" for name in EVALS)]
        return [Path(config.synthetic.output) / name for name in [*names, "raw/leaks.json"]]
    if isinstance(config, schema.InitialiseConfig):
        return [Path(config.initialise.output)]
    raise TypeError(f"unknown configuration {type(config).__name__}")


# Key of the output, for messages.
_OUTPUT_KEYS: dict[type, str] = {
    schema.SftConfig: "run.dir",
    schema.DpoConfig: "run.dir",
    schema.RewardModelConfig: "run.dir",
    schema.RlvrConfig: "run.dir",
    schema.EvalConfig: "eval.output",
    schema.PreferConfig: "prefer.output",
    schema.MixConfig: "mix.output",
    schema.DecontaminateConfig: "decontaminate.output",
    schema.SyntheticConfig: "synthetic.output",
    schema.InitialiseConfig: "initialise.output",
    schema.RecipeConfig: "report.output",
}


def check_files(config: Any) -> None:
    """Refuse a configuration whose outputs would destroy something or cannot be written.

    Raises:
        ConfigError: an output is one of the inputs or lies in one, so that it replaces it or is read the next time; a
            directory to be replaced holds an input or files that are not ours; a file is where a directory must be.
    """
    key = _OUTPUT_KEYS[type(config)]
    files, directories = _places(config)
    for path in [*files, *directories]:
        _require_place(path, key, is_directory=path in directories)
    data = [path for path in map(Path, _data_of(config)) if path.exists()]
    models = [path for path in map(Path, _models_of(config)) if path.exists()]
    for output in [*files, *directories]:
        for read in data:
            if _lies_in(output, read):
                what = "would replace" if output.resolve() == read.resolve() else "lies in"
                raise ConfigError(f"{key}: {output} {what} {read}, which is read here; give another output")
    for output in directories:
        for read in [*data, *models]:
            if _lies_in(read, output):
                raise ConfigError(f"{key}: {output} would be replaced, and {read} is read from there")
    if isinstance(config, schema.InitialiseConfig):
        _require_own(Path(config.initialise.output), key)


def _places(config: Any) -> tuple[list[Path], list[Path]]:
    """Files that the verb writes, and directories that it replaces."""
    if isinstance(config, schema.RecipeConfig):
        return [Path(config.report.output), Path(config.run.root) / ".recipe" / "lock"], []
    if isinstance(config, schema.EvalConfig):
        return [*outputs_of(config, ["--both"]), Path(config.run.root) / "unseen_runs.jsonl"], []
    if isinstance(config, schema.InitialiseConfig):
        return [], outputs_of(config)
    if isinstance(config, schema.PreferConfig):
        return outputs_of(config), [Path(f"{config.prefer.output}.parts")]
    if isinstance(config, schema.StageConfig):
        if config.run.dir is None:
            return [Path(config.run.root) / "new" / "metrics.jsonl"], []
        metrics, *exported = outputs_of(config)
        return [metrics], exported
    return outputs_of(config), []


def _require_place(path: Path, key: str, *, is_directory: bool) -> None:
    if path.exists() and path.is_dir() != is_directory:
        there, wanted = ("file", "directory") if is_directory else ("directory", "file")
        raise ConfigError(f"{key}: {path} is a {there}, it must become a {wanted}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ConfigError(f"{key}: {path} cannot be written, {above} is a file")


def _lies_in(path: Path, other: Path) -> bool:
    return path.resolve().is_relative_to(other.resolve())


def _require_own(directory: Path, key: str) -> None:
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    for entry in entries:
        if not entry.is_file() or not any(fnmatchcase(entry.name, pattern) for pattern in _MODEL_FILES):
            raise ConfigError(
                f"{key}: {directory} would be replaced, and {entry.name} in it is not part of a model; "
                "give a directory that is new, empty or an earlier model"
            )


def missing(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def files_below(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and for a directory all files below it; sorted."""
    return sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Digest of each file or directory (all files below it) by path."""
    return {str(path): _digest(path) for path in paths}


def _digest(path: Path) -> str:
    if path.is_file():
        return _file_digest(path)
    total = hashlib.sha256()
    for file in files_below([path]):
        total.update(f"{file.relative_to(path)}\0{_file_digest(file)}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    status = path.stat()
    if status.st_size > _HASHED_BYTES:
        return f"size {status.st_size}, changed {status.st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
