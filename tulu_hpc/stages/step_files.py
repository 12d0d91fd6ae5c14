"""Which files a step reads and writes, by its configuration, and digests to see whether they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tulu_hpc.config import schema

_HASHED_BYTES = (
    256 * 2**20
)  # a larger file is known by size and time of change: hashing 800 GB takes longer than it saves


def inputs_of(config: Any) -> list[Path]:
    """Local files and directories that the step reads (Hugging Face ids and files that are not there are left out)."""
    names: list[str] = []
    if isinstance(config, schema.SftConfig | schema.DpoConfig | schema.RlvrConfig | schema.PreferConfig):
        names = [config.model.path, *config.data.path]
    elif isinstance(config, schema.EvalConfig):
        tasks = [*config.eval.dev, *config.eval.unseen]
        names = [
            config.model.path,
            *(task.path for task in tasks),
            *(t.few_shot_path for t in tasks if t.few_shot_path),
        ]
    elif isinstance(config, schema.MixConfig):
        names = [source.path for source in config.mix.sources]
    elif isinstance(config, schema.DecontaminateConfig):
        section = config.decontaminate
        names = [*(source.path for source in section.train), *(prompts.path for prompts in section.evals)]
        names += [section.planted] if section.planted else []
    elif isinstance(config, schema.InitialiseConfig):
        names = config.tokenizer.texts
    return [path for path in map(Path, dict.fromkeys(names)) if path.exists()]


def outputs_of(config: Any, options: Sequence[str] = ()) -> list[Path]:
    """What must be there when the step is done; `options` are those of the verb (`--unseen`, `--both`).

    Raises:
        ValueError: a training step without run.dir, whose result no later step could find.
    """
    if isinstance(config, schema.SftConfig | schema.DpoConfig | schema.RlvrConfig):
        if config.run.dir is None:
            raise ValueError("a training step of a recipe needs run.dir")
        run_dir = Path(config.run.dir)
        return [run_dir / "metrics.jsonl", *([run_dir / "hf" / "config.json"] if config.train.export_hf else [])]
    if isinstance(config, schema.EvalConfig):
        suites = {"--unseen": ["unseen"], "--both": ["dev", "unseen"]}.get(next(iter(options), ""), ["dev"])
        return [Path(config.eval.output) / f"{suite}.json" for suite in suites]
    if isinstance(config, schema.PreferConfig):
        return [Path(config.prefer.output), Path(f"{config.prefer.output}.stats.json")]
    if isinstance(config, schema.MixConfig):
        return [Path(config.mix.output)]
    if isinstance(config, schema.DecontaminateConfig):
        return [Path(config.decontaminate.output) / "report.json"]
    if isinstance(config, schema.SyntheticConfig):
        return [Path(config.synthetic.output)]
    if isinstance(config, schema.InitialiseConfig):
        return [Path(config.initialise.output) / "config.json"]
    raise TypeError(f"unknown configuration {type(config).__name__}")


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
