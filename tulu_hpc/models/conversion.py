"""Hugging Face directories to torch_dist checkpoints and back, without building a model or a process group.

Each thread writes one file at a time and holds one block of one tensor (a few MiB), whatever the model's size. Every
tensor is hashed on the way in and on the way out (xxh3-128 of its bytes under its Hugging Face name, row after row);
the hashes go into `conversion.json` (`model_files`), and a source that has one is held against it while it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from tulu_hpc.models import torch_dist_files
from tulu_hpc.models.checksums import file_entry
from tulu_hpc.models.companions import copy_companions, write_config
from tulu_hpc.models.conversion_job import ConversionError, Note, identity, staged, write_files
from tulu_hpc.models.model_files import (
    CHECKPOINT,
    FORMAT,
    HUGGINGFACE,
    RECORD,
    Model,
    check_against_record,
    dtype_name,
    open_model,
    single_dtype,
)
from tulu_hpc.models.names import hf_shapes
from tulu_hpc.models.safetensors_files import plan_shards, shard_files, shard_header, write_shard_index
from tulu_hpc.models.stored_names import Parameter, stored_parameters
from tulu_hpc.models.stored_tensors import Bytes, Files, cast, read_blocks
from tulu_hpc.models.torch_dist_files import Chunk, ChunkFile

# Chunks of a checkpoint: small enough that a rank that needs a part of one reads little too much.
CHUNK_BYTES = 64 << 20
COLUMN_BAND_BYTES = 8 << 20  # what is held to deal a band of rows into chunks of columns
COLUMN_CHUNKS = 8

Done = Callable[[int, bool], None]


class Hashes:
    """xxh3 of tensors as they pass by: as read, and as written where the dtype changes."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._read: dict[str, Any] = {}
        self._written: dict[str, Any] = {}

    def convert(self, name: str, block: Bytes) -> Bytes:
        """The next rows of a tensor in the dtype they are written in."""
        if name not in self._read:
            self._read[name], self._written[name] = xxhash.xxh3_128(), xxhash.xxh3_128()
        source = self._model.tensors[name].dtype
        self._read[name].update(block.data)
        if source == self._dtype:
            return block
        converted = cast(block, source, self._dtype)
        self._written[name].update(converted.data)
        return converted

    def note(self) -> dict[str, Note]:
        """Per tensor what goes into `conversion.json`.

        Raises:
            ConversionError: a tensor is not what the source's own record says.
        """
        found: dict[str, Note] = {}
        for name, digest in self._read.items():
            tensor, read = self._model.tensors[name], digest.hexdigest()
            check_against_record(self._model, name, read)
            entry: Note = {"dtype": dtype_name(self._dtype), "shape": list(tensor.shape), "xxh3": read}
            if tensor.dtype != self._dtype:
                entry["xxh3"] = self._written[name].hexdigest()
                entry["source"] = {"dtype": dtype_name(tensor.dtype), "xxh3": read}
            found[name] = entry
        return found


def import_hf(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 2e9,
    workers: int = 4,
    done: Done = lambda count, kept: None,
) -> Note:
    """Write a Hugging Face directory as a checkpoint that training starts from at any layout.

    Args:
        dtype: of the written weights; None: that of the source.
        max_shard_bytes: largest file, unless one parameter is larger.
        workers: threads, each with a file of its own.

    Returns:
        What `conversion.json` holds.

    Raises:
        ValueError: naming what is wrong with the source, or that the target exists.
    """
    model = open_model(source)
    if model.kind != HUGGINGFACE:
        raise ConversionError(f"{source}: is a checkpoint already")
    dtype = dtype or single_dtype(model)
    shards = _plan_parameters(model, dtype, max_shard_bytes)
    names = [f"__{index}_0.distcp" for index in range(len(shards))]
    plan = _plan(CHECKPOINT, model, dtype, [[f"{p.key} {p.layer}" for p in shard] for shard in shards])
    with Files() as files, staged(target, plan) as staging:

        def write(index: int, sink: Callable[[Any], object], check: Callable[[], None]) -> Note:
            hashes, output = Hashes(model, dtype), ChunkFile(names[index], sink)
            chunks: list[Chunk] = []
            for parameter in shards[index]:
                chunks += _write_parameter(parameter, model, files, hashes, output, dtype, check)
            return {"tensors": hashes.note(), "chunks": [asdict(chunk) for chunk in chunks]}

        notes = write_files(staging, names, write, workers=workers, done=done)
        chunks = [
            Chunk(**{**chunk, "offsets": tuple(chunk["offsets"]), "sizes": tuple(chunk["sizes"])})
            for note in notes
            for chunk in note["chunks"]
        ]
        torch_dist_files.write_index(staging, chunks, dtype, model.architecture, model.head)
        return _finish(staging, model, plan, names, notes, dtype)


def export_hf(
    source: Path,
    target: Path,
    *,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    workers: int = 4,
    chat_template: str | None = None,
    done: Done = lambda count, kept: None,
) -> Note:
    """Write the model of a checkpoint, of a run or imported, as a Hugging Face directory.

    Args:
        base: directory with config.json and tokenizer, if not in `source`.
        chat_template: Jinja text that takes the place of the base's; None: that of the base.
        (others): as `import_hf`.

    Raises:
        ValueError: naming what is wrong with the source, or that the target exists.
    """
    model = open_model(source, base)
    if model.kind != CHECKPOINT:
        raise ConversionError(f"{source}: is a Hugging Face directory already")
    dtype = dtype or single_dtype(model)
    shapes = hf_shapes(model.architecture, model.head)
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    names = shard_files(shards)
    plan = _plan(HUGGINGFACE, model, dtype, shards)
    with Files() as files, staged(target, plan) as staging:

        def write(index: int, sink: Callable[[Any], object], check: Callable[[], None]) -> Note:
            hashes = Hashes(model, dtype)
            sink(shard_header(shards[index], shapes, dtype))
            for name in shards[index]:
                for block in read_blocks(model.tensors[name], files):
                    check()
                    sink(hashes.convert(name, block))
            return {"tensors": hashes.note()}

        notes = write_files(staging, names, write, workers=workers, done=done)
        write_shard_index(staging, shards, shapes, dtype)
        return _finish(staging, model, plan, names, notes, dtype, chat_template)


def _plan(kind: str, model: Model, dtype: torch.dtype, shards: object) -> Note:
    sources = identity([*model.files, model.base / "config.json"])
    plan: Note = {"format": FORMAT, "kind": kind, "dtype": dtype_name(dtype), "source": str(model.path.resolve())}
    return {**plan, "sources": sources, "shards": shards}


def _plan_parameters(model: Model, dtype: torch.dtype, max_shard_bytes: float) -> list[list[Parameter]]:
    shards: list[list[Parameter]] = [[]]
    used = 0
    for parameter in stored_parameters(model.architecture, model.head):
        size = math.prod(parameter.shape) * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(parameter)
        used += size
    return shards


def _write_parameter(
    parameter: Parameter,
    model: Model,
    files: Files,
    hashes: Hashes,
    output: ChunkFile,
    dtype: torch.dtype,
    check: Callable[[], None],
) -> Iterator[Chunk]:
    """Append one parameter, in chunks of rows, or of a band of rows times a share of the columns."""
    rows, width = parameter.shape[0], math.prod(parameter.shape[1:])
    lead = () if parameter.layer is None else (parameter.layer,)
    one = () if parameter.layer is None else (1,)
    size = width * dtype.itemsize
    if not parameter.split_columns:
        height = max(1, CHUNK_BYTES // size)
        for top in range(0, rows, height):
            bottom = min(top + height, rows)
            sizes = (bottom - top, *parameter.shape[1:])
            offsets = (top, *(0 for _ in parameter.shape[1:]))
            blocks = _parameter_rows(parameter, model, files, hashes, top, bottom, check)
            yield output.add(parameter.key, lead + offsets, one + sizes, dtype, blocks)
        return
    share = width // math.gcd(width, COLUMN_CHUNKS)
    height = max(1, COLUMN_BAND_BYTES // size)
    band = np.empty((height, size), np.uint8)
    for top in range(0, rows, height):
        bottom, at = min(top + height, rows), 0
        for block in _parameter_rows(parameter, model, files, hashes, top, bottom, check):
            band[at : at + len(block)] = block
            at += len(block)
        for left in range(0, width, share):
            columns = band[:at, left * dtype.itemsize : (left + share) * dtype.itemsize]
            part = np.ascontiguousarray(columns)
            yield output.add(parameter.key, (*lead, top, left), (*one, bottom - top, share), dtype, [part])


def _parameter_rows(
    parameter: Parameter,
    model: Model,
    files: Files,
    hashes: Hashes,
    top: int,
    bottom: int,
    check: Callable[[], None],
) -> Iterator[Bytes]:
    """Rows of a parameter, in order, from the Hugging Face tensors they come from, in the dtype to be written."""
    at = 0
    for part in parameter.parts:
        first, last = max(at, top), min(at + part.count, bottom)
        if first < last:
            start = part.start + first - at
            for block in read_blocks(model.tensors[part.name], files, start, start + last - first):
                check()
                yield hashes.convert(part.name, block)
        at += part.count


def _finish(
    staging: Path,
    model: Model,
    plan: Note,
    names: Sequence[str],
    notes: Sequence[Note],
    dtype: torch.dtype,
    chat_template: str | None = None,
) -> Note:
    """Config, tokenizer and `conversion.json`."""
    write_config(staging, model.architecture, dtype, source=model.base, head=model.head)
    copy_companions(model.base, staging)
    if chat_template is not None:
        (staging / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    tensors = {name: entry for note in notes for name, entry in note["tensors"].items()}
    record = {
        "format": FORMAT,
        "kind": plan["kind"],
        "source": plan["source"],
        "dtype": plan["dtype"],
        "tensors": {name: tensors[name] for name in hf_shapes(model.architecture, model.head)},
        "files": {name: note["file"] for name, note in zip(names, notes, strict=True)},
    }
    written = {*names, RECORD}  # the record itself may be there, from a start that was killed after writing it
    for file in sorted(staging.iterdir()):
        if file.is_file() and file.name not in written:
            record["files"][file.name] = file_entry(file)
    (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record
