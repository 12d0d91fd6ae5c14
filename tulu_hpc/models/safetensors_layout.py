"""Where the tensors of a Hugging Face directory lie in its files, by their headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.names import HEAD, IGNORED, SCORE, hf_shapes
from tulu_hpc.models.safetensors_files import DTYPE_NAMES, INDEX, HfDirectory
from tulu_hpc.models.stored_tensors import Piece, StoredTensor

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_HEADER = 100_000_000  # as the safetensors library has it


def hf_tensors(path: Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """Every tensor of the model, in the order it runs. Reads headers only.

    A directory with `score.weight` is one of a model with a scalar head.

    Raises:
        ValueError: naming the directory or file and the tensor: missing, unexpected, of another shape or damaged.
    """
    directory = HfDirectory(path)
    directory.close()
    headers = {file: read_header(path / file) for file in sorted(set(directory.file_of.values()))}
    shapes = hf_shapes(architecture, "value" if SCORE in directory.file_of else "logprobs")
    check_names(path, directory.file_of, shapes, extra_head=architecture.tie_word_embeddings)
    found: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        file = directory.file_of[name]
        tensor = headers[file].get(name)
        if tensor is None:
            raise ValueError(f"{path / file}: has no tensor {name}, which {INDEX} says is there")
        if tensor.shape != shape:
            raise ValueError(f"{path}: {name} has shape {tensor.shape}, config.json says {shape}")
        found[name] = tensor
    return found


def check_names(path: Path, names: Iterable[str], wanted: Collection[str], *, extra_head: bool) -> None:
    """That the directory holds the tensors of the model and no others.

    Args:
        extra_head: a vocabulary head that is not wanted may be there: some exporters write a copy of a tied embedding.

    Raises:
        ValueError: naming the first missing and unexpected ones.
    """
    found = {name for name in names if not IGNORED.match(name)}
    if extra_head:
        found.discard(HEAD)
    missing, unexpected = sorted(set(wanted) - found), sorted(found - set(wanted))
    if missing or unexpected:
        raise ValueError(
            f"{path}: does not hold the model that its config describes; "
            f"missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}"
        )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: naming the file: no safetensors file, cut off, or a dtype that no model of ours has.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{file}: not a readable safetensors file: its header would take {length} bytes")
        text = stream.read(length)
    found: dict[str, StoredTensor] = {}
    try:
        entries = json.loads(text)
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} has dtype {entry['dtype']}, read are {', '.join(_DTYPES)}")
            dtype = _DTYPES[entry["dtype"]]
            if end - start != math.prod(shape) * dtype.itemsize or start < 0:
                raise ValueError(f"{name}: {end - start} bytes are not a {entry['dtype']} of shape {shape}")
            if 8 + length + end > size:
                raise ValueError(f"{name} ends at byte {8 + length + end}, the file at {size}")
            rows = shape[0] if shape else 1
            piece = Piece(file, 8 + length + start, 0, 0, rows, math.prod(shape[1:]))
            found[name] = StoredTensor(name, dtype, shape, (piece,))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    return found
