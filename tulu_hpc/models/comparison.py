"""Whether two models in files are the same, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import xxhash

from tulu_hpc.models.model_files import Model, check_against_record, dtype_name
from tulu_hpc.models.stored_tensors import Files, cast, read_blocks


@dataclass(frozen=True)
class Difference:
    """A tensor that two models do not have in common."""

    name: str
    what: str


def compare(
    left: Model,
    right: Model,
    *,
    dtype: torch.dtype | None = None,
    workers: int = 4,
    done: Callable[[int], None] = lambda count: None,
) -> list[Difference]:
    """Read both models whole and compare shape, dtype and checksum of every tensor.

    Args:
        dtype: compare the numbers rounded to it, whatever each side's dtype.

    Returns:
        What differs, in the order the model runs; empty: nothing.

    Raises:
        ConversionError: a side is not what its own `conversion.json` says.
    """
    names = list(dict.fromkeys([*left.tensors, *right.tensors]))
    finished = iter(range(1, len(names) + 1))

    def one(name: str) -> Difference | None:
        a, b = left.tensors.get(name), right.tensors.get(name)
        found = None
        if a is None or b is None:
            found = f"only in {(right if a is None else left).path}"
        elif a.shape != b.shape:
            found = f"shape {a.shape} in {left.path}, {b.shape} in {right.path}"
        elif dtype is None and a.dtype != b.dtype:
            found = f"dtype {dtype_name(a.dtype)} in {left.path}, {dtype_name(b.dtype)} in {right.path}"
        else:
            first = _hash_tensor(left, name, files, dtype)
            second = _hash_tensor(right, name, files, dtype)
            if first != second:
                found = f"xxh3 {first} in {left.path}, {second} in {right.path}"
        done(next(finished))
        return None if found is None else Difference(name, found)

    with Files() as files, ThreadPoolExecutor(workers) as pool:
        return [each for each in pool.map(one, names) if each is not None]


def _hash_tensor(model: Model, name: str, files: Files, dtype: torch.dtype | None) -> str:
    """xxh3 of a tensor, also held against the model's record."""
    tensor = model.tensors[name]
    target = tensor.dtype if dtype is None else dtype
    read, compared = xxhash.xxh3_128(), xxhash.xxh3_128()
    for block in read_blocks(tensor, files):
        read.update(block.data)
        if target != tensor.dtype:
            compared.update(cast(block, tensor.dtype, target).data)
    check_against_record(model, name, read.hexdigest())
    return (read if target == tensor.dtype else compared).hexdigest()
