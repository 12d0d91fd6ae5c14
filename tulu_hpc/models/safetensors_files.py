"""Hugging Face safetensors directories: reading slices, writing shards, replacing a directory in one step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class HfDirectory:
    """Read access to the tensors of a directory; files are opened when first needed and closed by `close`.

    Raises:
        ValueError: no safetensors there, or an index that names a missing file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, Any] = {}
        self.file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.is_file():
            try:
                weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index}: not an index of safetensors files: {error!r}") from error
            missing = sorted({name for name in weight_map.values() if not (self.path / name).is_file()})
            if missing:
                raise ValueError(f"{index}: names files that do not exist: {', '.join(missing)}")
            return weight_map
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        raise ValueError(f"{self.path}: neither {SINGLE} nor {INDEX} found; only safetensors are read")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(str(self.path / name), framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.path / name}: not a readable safetensors file: {error}") from error
        return self._open[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """Part of a tensor; only that part is read from the file."""
        return self._slice(name)[slices]

    def _slice(self, name: str) -> Any:
        file = self.file_of[name]
        try:
            return self._file(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path / file}: {error}, which {INDEX} says is there") from error

    def close(self) -> None:
        self._open.clear()


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], bytes_per_element: int, max_shard_bytes: float
) -> list[list[str]]:
    """Names per file, in order; a tensor larger than `max_shard_bytes` has a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel()) * bytes_per_element
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def shard_files(shards: Sequence[object]) -> list[str]:
    """Names of the files, as transformers gives them."""
    count = len(shards)
    return [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def shard_header(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """What a safetensors file begins with when these tensors follow one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + int(torch.Size(shapes[name]).numel()) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard_index(
    directory: Path, shards: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Write which tensor is in which file; nothing if there is one file only."""
    if len(shards) == 1:
        return
    total = sum(int(torch.Size(shape).numel()) for shape in shapes.values()) * dtype.itemsize
    weight_map = {name: file for file, names in zip(shard_files(shards), shards, strict=True) for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (directory / INDEX).write_text(text + "\n")


def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_shard_bytes: float,
) -> None:
    """Write a stream of tensors as Hugging Face shards with their index; holds one tensor in memory.

    Args:
        tensors: (name, tensor on the CPU), in the order of `shapes`.

    Raises:
        ValueError: a tensor out of order or of another shape.
    """
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    stream = iter(tensors)
    for file, names in zip(shard_files(shards), shards, strict=True):
        with (directory / file).open("wb") as output:
            output.write(shard_header(names, shapes, dtype))
            for wanted in names:
                name, tensor = next(stream, ("nothing", torch.empty(0)))
                if name != wanted or tuple(tensor.shape) != tuple(shapes[wanted]):
                    raise ValueError(f"expected {wanted} {shapes[wanted]}, got {name} {tuple(tensor.shape)}")
                output.write(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
                del tensor
    write_shard_index(directory, shards, shapes, dtype)


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends without an error, synced to disk.

    A killed writer leaves the old directory or the whole new one: between the two renames of a replacement `target` is
    missing for a moment, and the next call puts the old one back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.writing")
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        os.rename(previous, target)
    for leftover in (staging, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    staging.mkdir()
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for path in [*staging.rglob("*"), staging]:
        sync_to_disk(path)
    if target.exists():
        os.rename(target, previous)
    os.rename(staging, target)
    sync_to_disk(target.parent)
    if previous.exists():
        shutil.rmtree(previous)


def sync_to_disk(path: Path) -> None:
    """fsync of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
