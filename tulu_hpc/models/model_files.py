"""A model in files, of either kind, and the record that a conversion leaves beside it.

`conversion.json` holds the size and checksum of every file and the dtype, shape and checksum of every tensor (xxh3-128
of its bytes under its Hugging Face name, row after row), whichever kind of directory it lies in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models import safetensors_layout, torch_dist_files
from tulu_hpc.models.checksums import file_entry
from tulu_hpc.models.conversion_job import ConversionError, Note
from tulu_hpc.models.names import SCORE
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.models.stored_tensors import StoredTensor

RECORD = "conversion.json"
FORMAT = 1
CHECKPOINT, HUGGINGFACE = "checkpoint", "huggingface"


def is_imported(path: Path) -> bool:
    """Whether the directory is what `import_hf` writes."""
    record = path / RECORD
    return record.is_file() and read_record(path).get("kind") == CHECKPOINT


def read_record(path: Path) -> Note:
    """`conversion.json` of a directory.

    Raises:
        ConversionError: it cannot be read or is of another version.
    """
    try:
        record: Note = json.loads((path / RECORD).read_text())
        version = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path / RECORD}: not readable: {error!r}") from error
    if version != FORMAT:
        raise ConversionError(f"{path / RECORD}: format {version}, this version reads {FORMAT}")
    return record


@dataclass(frozen=True)
class Model:
    """A model in files.

    Attributes:
        path: directory of the weights.
        kind: `checkpoint` or `huggingface`.
        base: directory of config.json and the tokenizer.
        tensors: by Hugging Face name, in the order the model runs.
        checksums: what is known of them from an earlier conversion, else empty.
    """

    path: Path
    kind: str
    base: Path
    architecture: Architecture
    tensors: dict[str, StoredTensor]
    checksums: dict[str, str]

    @property
    def head(self) -> Head:
        return "value" if SCORE in self.tensors else "logprobs"

    @property
    def files(self) -> list[Path]:
        return sorted({piece.file for tensor in self.tensors.values() for piece in tensor.pieces})


def open_model(path: Path, base: Path | None = None) -> Model:
    """Find the tensors of a directory of either kind; reads no weights.

    Args:
        base: where config.json is, if not in `path` (the checkpoint of a run).

    Raises:
        ValueError: naming the directory, file or tensor that is not as it should be.
    """
    base = path if base is None else base
    architecture = Architecture.from_hf(base)
    stored = (path / torch_dist_files.METADATA).is_file()
    read = torch_dist_files.hf_tensors if stored else safetensors_layout.hf_tensors
    checksums: dict[str, str] = {}
    if (path / RECORD).is_file():
        checksums = {name: entry["xxh3"] for name, entry in read_record(path)["tensors"].items()}
    kind = CHECKPOINT if stored else HUGGINGFACE
    return Model(path, kind, base, architecture, read(path, architecture), checksums)


def check_against_record(model: Model, name: str, found: str) -> None:
    wanted = model.checksums.get(name)
    if wanted is not None and wanted != found:
        raise ConversionError(f"{model.path}: {name} is damaged: xxh3 {found}, {RECORD} says {wanted}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def single_dtype(model: Model) -> torch.dtype:
    dtypes = {tensor.dtype: name for name, tensor in model.tensors.items()}
    if len(dtypes) > 1:
        listed = ", ".join(f"{name} is {dtype_name(dtype)}" for dtype, name in dtypes.items())
        raise ConversionError(f"{model.path}: its tensors differ in dtype ({listed}); say which to write (--dtype)")
    return next(iter(dtypes))


def verify_files(path: Path, names: Sequence[str] | None = None) -> Mapping[str, str]:
    """Which files of a converted directory (all, or these) are not as `conversion.json` says, and how."""
    wanted = read_record(path)["files"]
    problems: dict[str, str] = {}
    for name in wanted if names is None else names:
        if not (path / name).is_file():
            problems[name] = "missing"
        elif (found := file_entry(path / name)) != wanted[name]:
            problems[name] = f"{found} does not match {RECORD}'s {wanted[name]}"
    return problems
