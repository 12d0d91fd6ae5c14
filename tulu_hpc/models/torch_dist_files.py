"""torch_dist checkpoints as files: where each chunk of a tensor lies, and writing chunks without a process group.

The format is torch.distributed.checkpoint's: `.metadata` lists for every tensor its chunks (offset and size in the
tensor) and where each lies; a chunk is a `torch.save` archive somewhere in a `.distcp` file, its numbers uncompressed.
Loaded by megatron-core at any layout.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.names import SCORE
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.models.stored_names import EXTRA_STATES, Parameter, stored_parameters
from tulu_hpc.models.stored_tensors import Bytes, Piece, StoredTensor

METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
EXTRA = "extra_states.distcp"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_NOT_THE_MODEL = ("optimizer.", "rng")


@dataclass(frozen=True)
class Chunk:
    """One chunk of a checkpoint's tensor: its place in the tensor and in a file."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def hf_tensors(path: Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """The model of a checkpoint under its Hugging Face names, in the order it runs. Reads no weights.

    A checkpoint with `score.weight` is one of a model with a scalar head.

    Raises:
        ValueError: naming the checkpoint and the tensor: missing, unexpected, incomplete or of another shape.
    """
    metadata = _read_metadata(path)
    tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    parameters = list(stored_parameters(architecture, "value" if SCORE in tensors else "logprobs"))
    known = {parameter.key for parameter in parameters}
    missing = sorted(known - tensors.keys())
    unexpected = sorted(key for key in tensors.keys() - known if not key.startswith(_NOT_THE_MODEL))
    if missing or unexpected:
        raise ValueError(
            f"{path}: does not hold the model that its config describes; "
            f"missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}"
        )
    chunks = {key: _chunks_by_layer(key, tensors[key], metadata, path) for key in sorted(known)}
    found: dict[str, StoredTensor] = {}
    for parameter in parameters:
        stored = tensors[parameter.key]
        _check_shape(parameter, tuple(stored.size), architecture, path)
        own = chunks[parameter.key].get(parameter.layer or 0, [])
        for name in parameter.hf_names:
            rows = sum(part.count for part in parameter.parts if part.name == name)
            tensor = StoredTensor(
                name,
                stored.properties.dtype,
                (rows, *parameter.shape[1:]),
                tuple(_pieces_of(name, parameter, own, stored.properties.dtype.itemsize)),
            )
            try:
                tensor.check_complete()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            found[name] = tensor
    return found


def _read_metadata(path: Path) -> Metadata:
    try:
        metadata = FileSystemReader(str(path)).read_metadata()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"holds {type(metadata).__name__}")
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ValueError(f"{path / METADATA}: not the index of a torch_dist checkpoint: {error!r}") from error
    return metadata


def _check_shape(parameter: Parameter, found: tuple[int, ...], architecture: Architecture, path: Path) -> None:
    """The checkpoint's tensor against the model; the vocabulary may be padded."""
    wanted = parameter.shape
    if parameter.layer is not None:
        wanted = (architecture.num_hidden_layers, *wanted)
    rows_fit = found[:1] == wanted[:1] or (parameter.padded and found[:1] > wanted[:1])
    if len(found) != len(wanted) or not rows_fit or found[1:] != wanted[1:]:
        raise ValueError(f"{path}: {parameter.key} has shape {found}, the config says {wanted}")


def _chunks_by_layer(key: str, stored: TensorStorageMetadata, metadata: Metadata, path: Path) -> dict[int, list[Piece]]:
    """The chunks of a tensor as pieces of the parameter of one layer; layer 0 if there is no layer axis."""
    layered = key.startswith("decoder.layers.")
    found: dict[int, list[Piece]] = {}
    for chunk in stored.chunks:
        entry = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if entry is None:
            raise ValueError(f"{path / METADATA}: {key} at {tuple(chunk.offsets)} is in no file")
        file = path / entry.relative_path
        start = entry.offset + _data_offset(file, entry, stored.properties.dtype, tuple(chunk.sizes), key)
        size = stored.properties.dtype.itemsize
        if not layered:
            found.setdefault(0, []).append(_piece(file, start, tuple(chunk.offsets), tuple(chunk.sizes)))
            continue
        own = _piece(file, start, tuple(chunk.offsets[1:]), tuple(chunk.sizes[1:]))
        for index in range(chunk.sizes[0]):  # several layers may share a chunk
            moved = start + index * own.rows * own.columns * size
            found.setdefault(chunk.offsets[0] + index, []).append(replace(own, offset=moved))
    return found


def _piece(file: Path, start: int, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Piece:
    (row, *column), (rows, *columns) = offsets, sizes
    return Piece(file, start, row, column[0] if column else 0, rows, columns[0] if columns else 1)


def _data_offset(file: Path, entry: _StorageInfo, dtype: torch.dtype, sizes: tuple[int, ...], key: str) -> int:
    """Where in its archive the numbers of a chunk begin."""
    try:
        with file.open("rb") as stream:
            stream.seek(entry.offset)
            archive = _Archive(stream, entry.offset, entry.length)
            # On the meta device torch reads the description of the tensor and notes where its numbers lie.
            tensor: Any = torch.load(archive, map_location="meta", weights_only=True)  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise ValueError(f"{file}: missing, {METADATA} names it") from error
    except Exception as error:  # torch.load raises whatever its parsers raise
        raise ValueError(f"{file}: {key} at byte {entry.offset} is not a tensor: {error}") from error
    if tensor.dtype != dtype or tuple(tensor.shape) != sizes or not tensor.is_contiguous() or tensor.storage_offset():
        raise ValueError(f"{file}: {key} at byte {entry.offset} is not what {METADATA} says")
    return int(tensor.untyped_storage()._checkpoint_offset)


class _Archive(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view)
        self._at += count
        return count


def _pieces_of(name: str, parameter: Parameter, chunks: Sequence[Piece], itemsize: int) -> Iterator[Piece]:
    """The parts of a Hugging Face tensor inside the chunks of its parameter."""
    for chunk in chunks:
        at = 0
        for part in parameter.parts:
            top, bottom = max(at, chunk.row), min(at + part.count, chunk.row + chunk.rows)
            if part.name == name and top < bottom:
                yield chunk.part(top, bottom, part.start + top - at, itemsize)
            at += part.count


class ChunkFile:
    """A `.distcp` file being written, chunk after chunk.

    Args:
        write: takes the bytes in order.
    """

    def __init__(self, name: str, write: Callable[[Any], object]) -> None:
        self._name, self._write, self._at = name, write, 0

    def add(
        self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, blocks: Iterable[Bytes]
    ) -> Chunk:
        """Append one chunk, whose numbers come row by row in `blocks`."""
        head, tail = _archive_around(sizes, dtype)
        self._write(head)
        written = 0
        for block in blocks:
            self._write(block)
            written += block.nbytes
        self._write(tail)
        assert written == int(torch.Size(sizes).numel()) * dtype.itemsize, (key, sizes, written)
        start, length = self._at, len(head) + written + len(tail)
        self._at += length
        return Chunk(key, offsets, sizes, self._name, start, length)


@lru_cache(maxsize=64)
def _archive_around(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the numbers of a tensor."""
    recorder = _Recorder()
    with torch.serialization.skip_data():  # the memory below is never touched, so it takes none
        torch.save(torch.empty(sizes, dtype=dtype), recorder)  # type: ignore[arg-type]
    return b"".join(recorder.parts[False]), b"".join(recorder.parts[True])


class _Recorder:
    """Takes what is written; the only jump forward is over the numbers of the tensor."""

    def __init__(self) -> None:
        self.parts: dict[bool, list[bytes]] = {False: [], True: []}
        self._jumped = False

    def write(self, data: Any) -> int:
        self.parts[self._jumped].append(bytes(data))
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        if self._jumped or whence != io.SEEK_CUR:
            raise RuntimeError("torch.save writes in an order that is not known here")
        self._jumped = True

    def flush(self) -> None:
        pass


def write_index(
    directory: Path, chunks: Sequence[Chunk], dtype: torch.dtype, architecture: Architecture, head: Head
) -> None:
    """Write what makes a directory of `.distcp` files a checkpoint: `.metadata` and megatron's own two files, and the
    empty state objects of the layers (`extra_states.distcp`)."""
    layers = architecture.num_hidden_layers
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    by_key: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_key.setdefault(chunk.key, []).append(chunk)
    for parameter in stored_parameters(architecture, head):
        if parameter.key in state:
            continue
        size = parameter.shape if parameter.layer is None else (layers, *parameter.shape)
        own = sorted(by_key[parameter.key], key=lambda chunk: chunk.offsets)
        places = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in own]
        state[parameter.key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), places)
        for index, chunk in enumerate(own):
            info = _StorageInfo(chunk.file, chunk.start, chunk.length)
            storage[MetadataIndex(parameter.key, chunk.offsets, index)] = info
    nothing = io.BytesIO()
    torch.save([None], nothing)
    empty, at = nothing.getvalue(), 0
    with (directory / EXTRA).open("wb") as stream:
        for key in EXTRA_STATES:
            for layer in range(layers):
                stream.write(empty)
                name = f"{key}/shard_{layer}_{layers}"
                state[name] = BytesStorageMetadata()
                storage[MetadataIndex(name)] = _StorageInfo(EXTRA, at, len(empty))
                at += len(empty)
    (directory / METADATA).write_bytes(pickle.dumps(Metadata(state, None, storage, version="1.0.0")))
    torch.save({}, directory / COMMON)
    (directory / BACKEND).write_text(json.dumps(_BACKEND))
