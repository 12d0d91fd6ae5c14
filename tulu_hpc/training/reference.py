"""Reference log-probs of preference pairs, computed once and kept on disk.

The reference of DPO never changes, so its log-probs are a property of (weights, token ids). They are computed by
forward passes over the same kind of packs that training uses and stored under a key made of exactly that content:

    {directory}/{fingerprint of the weights}/index.json, shard_000000.npz, ...

so the cache does not depend on the order of the data, the layout, the seed or the run, and a run that is interrupted
while filling it goes on where it was. Rows found on disk are not trusted blindly: some are computed again at every
start.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from tulu_hpc.data.packed_batch import Item
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.training.pair_sums import PackOptions, Sums, compute_sums, item_key
from tulu_hpc.training.runner import Runner

COLUMN = "reference_logprobs"  # per-sequence column of items and packs: sum over the scored tokens


class ReferenceError(ValueError):
    """The cache does not agree with the reference model."""


def weights_fingerprint(path: Path, groups: Groups, *, dtype: str) -> str:
    """Content hash of a Hugging Face directory's config and weights, and of the dtype they are run in.

    Collective: the ranks share the reading.

    Raises:
        ReferenceError: the directory holds no safetensors file.
    """
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise ReferenceError(f"{path}: no *.safetensors file")
    names = ["config.json", *files]
    mine = {name: _file_hash(path / name) for name in names[groups.rank :: groups.world_size]}
    hashes = {name: entry for share in groups.all_gather_object(mine) for name, entry in share.items()}
    return xxhash.xxh3_128(json.dumps([dtype, [hashes[name] for name in names]]).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class ReferenceCache:
    """Rows of one reference model on disk. Only the main process writes.

    Attributes:
        rows: key -> (chosen, rejected) sums.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory / fingerprint
        self.rows: dict[str, Sums] = {}
        self._shards: dict[str, str] = {}
        index = self.directory / "index.json"
        if index.is_file():
            for name, wanted in json.loads(index.read_text())["shards"].items():
                self._load(name, wanted)

    def _load(self, name: str, wanted: str) -> None:
        file = self.directory / name
        if not file.is_file() or _file_hash(file) != wanted:
            print(f"reference cache: {file} is missing or damaged; its rows are computed again", file=sys.stderr)
            return
        with np.load(file) as shard:
            keys, sums = shard["keys"].tolist(), shard["sums"].tolist()
        self.rows.update({key.decode(): (pair[0], pair[1]) for key, pair in zip(keys, sums, strict=True)})
        self._shards[name] = wanted

    def append(self, rows: dict[str, Sums]) -> None:
        """Write rows as a new shard, then publish it in the index; each step is atomic."""
        self.directory.mkdir(parents=True, exist_ok=True)
        number = len(self._shards)
        while (name := f"shard_{number:06d}.npz") in self._shards:
            number += 1
        partial = self.directory / f".{name}.tmp"
        with partial.open("wb") as stream:
            np.savez(stream, keys=np.array([k.encode() for k in rows]), sums=np.array(list(rows.values()), np.float64))
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(self.directory / name)
        self._shards[name] = _file_hash(self.directory / name)
        index = self.directory / ".index.json.tmp"
        index.write_text(json.dumps({"shards": self._shards}, indent=1))
        index.rename(self.directory / "index.json")
        self.rows.update(rows)


def attach_reference(
    items: Sequence[Item],
    runner: Runner,
    *,
    directory: Path,
    fingerprint: str,
    options: PackOptions,
    tolerance: tuple[float, float],
    seed: int,
    verify_rows: int = 64,
    chunk_items: int = 1024,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Item]:
    """The pairs with column `reference_logprobs`; computes what the cache lacks. Collective.

    Args:
        runner: holds the reference model (DPO: the policy before its first step).
        tolerance: (absolute, relative) difference allowed between a row on disk and its recomputation.
        seed: chooses the rows that are computed again.
        chunk_items: pairs computed between two writes to disk.
        on_progress: called with the number of pairs whose log-probs are known.

    Raises:
        ReferenceError: a row on disk differs from what the model says.
    """
    groups = runner.groups
    cache = ReferenceCache(directory, fingerprint) if groups.is_main else None
    rows: dict[str, Sums] = groups.broadcast_object(cache.rows if cache is not None else None)
    keyed = {item_key(item): item for item in items}
    missing = [key for key in keyed if key not in rows]
    known = sorted(key for key in keyed if key in rows)
    if known:
        _verify(known, keyed, rows, runner, options, tolerance, seed, verify_rows)
    for start in range(0, len(missing), chunk_items):
        computed = compute_sums({key: keyed[key] for key in missing[start : start + chunk_items]}, runner, options)
        if cache is not None:
            cache.append(computed)
        rows.update(computed)
        on_progress(len(known) + min(start + chunk_items, len(missing)))
    columns = (rows[item_key(item)] for item in items)
    return [
        replace(item, per_sequence={**item.per_sequence, COLUMN: list(sums)})
        for item, sums in zip(items, columns, strict=True)
    ]


def _verify(
    known: list[str],
    keyed: dict[str, Item],
    rows: dict[str, Sums],
    runner: Runner,
    options: PackOptions,
    tolerance: tuple[float, float],
    seed: int,
    count: int,
) -> None:
    chosen = random.Random(seed).sample(known, min(count, len(known)))
    absolute, relative = tolerance
    for key, fresh in compute_sums({key: keyed[key] for key in chosen}, runner, options).items():
        for kind, old, new in zip(("chosen", "rejected"), rows[key], fresh, strict=True):
            if not abs(old - new) <= absolute + relative * abs(new):
                raise ReferenceError(
                    f"reference cache: the {kind} response of pair {keyed[key].id!r} has log-prob {old:.6f} on disk, "
                    f"the reference model says {new:.6f}; the cache was made by other code or settings: delete it"
                )
