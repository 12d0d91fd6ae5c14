"""Tensors lying in files as rectangles of bytes, read block by block; nothing is mapped, nothing kept.

A tensor of a safetensors file is one rectangle; one of a checkpoint is as many as there are chunks (a chunk per
parallel rank, say), and a Hugging Face tensor in a checkpoint, or the reverse, is a list of parts of them. Reading any
of these costs one block of memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

BLOCK_BYTES = 1 << 20  # read, hashed and written while it is in the processor's cache


class Files:
    """Open files by path, shared by threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, path: Path, offset: int, out: Bytes) -> None:
        """Fill `out` (contiguous) from the file.

        Raises:
            ValueError: the file ends before.
        """
        with self._lock:
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
        view, done = out.data.cast("B"), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{path}: ends at byte {offset + done}, before a tensor that should be there")
            done += count

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor that lies in a file, row after row without gaps.

    Attributes:
        offset: of its first byte in the file.
        row, column: of its first element in the tensor.
        rows, columns: its size in elements.
    """

    file: Path
    offset: int
    row: int
    column: int
    rows: int
    columns: int

    def part(self, top: int, bottom: int, row: int, itemsize: int) -> Piece:
        """Rows `top` to `bottom` (of the tensor this belongs to), as a piece from row `row` of another tensor."""
        offset = self.offset + (top - self.row) * self.columns * itemsize
        return replace(self, offset=offset, row=row, rows=bottom - top)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files. One-dimensional ones are read as [elements, 1].

    Attributes:
        pieces: cover it exactly once, in any order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> int:
        return int(torch.Size(self.shape[1:]).numel())

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def check_complete(self) -> None:
        """That the pieces add up to the tensor and stay inside it.

        Raises:
            ValueError: naming the tensor.
        """
        held = sum(piece.rows * piece.columns for piece in self.pieces)
        inside = all(
            piece.row >= 0
            and piece.column >= 0
            and piece.row + piece.rows <= self.shape[0]
            and piece.column + piece.columns <= self.columns
            for piece in self.pieces
        )
        if held != self.shape[0] * self.columns or not inside:
            raise ValueError(f"{self.name}: its stored parts hold {held} of {self.shape[0] * self.columns} elements")


def read_blocks(
    tensor: StoredTensor,
    files: Files,
    start: int = 0,
    stop: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Bytes]:
    """Rows `start` to `stop` in order, in blocks of whole rows, as bytes [rows, bytes of a row].

    A block is valid until the next one is asked for.
    """
    stop = tensor.shape[0] if stop is None else stop
    height = max(1, min(block_bytes // tensor.row_bytes, stop - start))
    buffer = np.empty((height, tensor.row_bytes), np.uint8)
    spare = np.empty(buffer.size, np.uint8) if any(p.columns != tensor.columns for p in tensor.pieces) else None
    waiting = sorted(
        (p for p in tensor.pieces if p.row < stop and p.row + p.rows > start), key=lambda p: p.row, reverse=True
    )
    active: list[Piece] = []
    for first in range(start, stop, height):
        last = min(first + height, stop)
        while waiting and waiting[-1].row < last:
            active.append(waiting.pop())
        active = [piece for piece in active if piece.row + piece.rows > first]
        for piece in active:
            _read_part(piece, tensor, files, first, last, buffer, spare)
        yield buffer[: last - first]


def _read_part(
    piece: Piece, tensor: StoredTensor, files: Files, first: int, last: int, buffer: Bytes, spare: Bytes | None
) -> None:
    """What the piece has of rows `first` to `last` of the tensor, into its place in the buffer."""
    top, bottom = max(first, piece.row), min(last, piece.row + piece.rows)
    size = tensor.dtype.itemsize
    width = piece.columns * size
    offset = piece.offset + (top - piece.row) * width
    target = buffer[top - first : bottom - first]
    if spare is None:
        files.read_into(piece.file, offset, target)
        return
    part = spare[: (bottom - top) * width]
    files.read_into(piece.file, offset, part)
    target[:, piece.column * size : piece.column * size + width] = part.reshape(bottom - top, width)


def cast(block: Bytes, source: torch.dtype, target: torch.dtype) -> Bytes:
    """The numbers of a block in another dtype, rounded to nearest; the same block if it has it already."""
    if source == target:
        return block
    numbers = torch.from_numpy(block).view(source).to(target)
    converted: Any = numbers.view(torch.uint8).numpy()
    return converted
