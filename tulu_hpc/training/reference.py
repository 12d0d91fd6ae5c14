"""Reference log-probs of preference pairs, computed once and kept on disk.

The reference of DPO never changes, so its log-probs are a property of (weights, token ids). They are computed by
forward passes over the same kind of packs that training uses and stored under a key made of exactly that content
(`reference_cache`); a run that is interrupted while filling the cache goes on where it was. Rows found on disk are not
trusted blindly: some are computed again at every start.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from tulu_hpc.data.packed_batch import Item, PackedBatch
from tulu_hpc.models.checksums import file_entry
from tulu_hpc.models.model_files import is_imported, read_record
from tulu_hpc.objectives.terms import sequence_sums
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.training.pair_sums import PackOptions, Sums, compute_sums, item_key
from tulu_hpc.training.reference_cache import ReferenceCache
from tulu_hpc.training.runner import Runner

COLUMN = "reference_logprobs"  # per-sequence column of items and packs: sum over the scored tokens


class ReferenceError(ValueError):
    """The cache does not agree with the reference model, or cannot be read or written."""


def weights_fingerprint(path: Path, groups: Groups, *, dtype: str) -> str:
    """Content hash of a model directory's config and weights, and of the dtype they are run in.

    Collective: the ranks share the reading.

    Raises:
        ReferenceError: the directory holds neither safetensors files nor an imported checkpoint.
    """
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files and is_imported(path):
        files = sorted(read_record(path)["files"])
    if not files:
        raise ReferenceError(f"{path}: no *.safetensors file")
    names = ["config.json", *files]
    mine = {name: file_entry(path / name)["xxh3"] for name in names[groups.rank :: groups.world_size]}
    hashes = {name: entry for share in groups.all_gather_object(mine) for name, entry in share.items()}
    return xxhash.xxh3_128(json.dumps([dtype, [hashes[name] for name in names]]).encode()).hexdigest()


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
    """The items (pairs, or sequences with a prompt) with column `reference_logprobs`; computes what the cache lacks.

    Collective.

    Args:
        runner: holds the reference model (DPO: the policy before its first step).
        tolerance: (absolute, relative) difference allowed between a row on disk and its recomputation.
        seed: chooses the rows that are computed again.
        chunk_items: pairs computed between two writes to disk.
        on_progress: called with the number of pairs whose log-probs are known.

    Raises:
        ReferenceError: on every rank; a row on disk differs from what the model says, or the disk fails.
    """
    groups = runner.groups
    cache, rows = _open(directory, fingerprint, groups)
    keyed = {item_key(item): item for item in items}
    # Sorted: which pairs share packs, and so the last bit of a sum, does not depend on the order of the data.
    missing = sorted(key for key in keyed if key not in rows)
    known = sorted(key for key in keyed if key in rows)
    on_progress(len(known))
    if known:
        _verify(known, keyed, rows, runner, options, tolerance, seed, verify_rows)
    for start in range(0, len(missing), chunk_items):
        computed = compute_sums({key: keyed[key] for key in missing[start : start + chunk_items]}, runner, options)
        _append(cache, computed, groups)
        rows.update(computed)
        on_progress(len(known) + min(start + chunk_items, len(missing)))
    columns = (rows[item_key(item)] for item in items)
    return [
        replace(item, per_sequence={**item.per_sequence, COLUMN: list(sums[: len(item.responses)])})
        for item, sums in zip(items, columns, strict=True)
    ]


def add_sums(packs: Sequence[PackedBatch], runner: Runner) -> None:
    """Give each pack the column `reference_logprobs` of its sequences by a forward pass of `runner` over these very
    packs. Collective over the replica."""
    for pack, logprobs_K in zip(packs, runner.logprobs(packs), strict=True):
        sequence_id_K = pack.sequence_id_K.to(logprobs_K.device)
        pack.per_sequence[COLUMN] = sequence_sums(logprobs_K, sequence_id_K, pack.num_sequences).cpu()


def _open(directory: Path, fingerprint: str, groups: Groups) -> tuple[ReferenceCache | None, dict[str, Sums]]:
    """The cache (on the main process) and its rows; what fails there is raised everywhere."""
    cache, failure = None, None
    if groups.is_main:
        try:
            cache = ReferenceCache(directory, fingerprint)
        except (OSError, ValueError) as error:
            failure = f"reference log-probs of {directory}: {error}"
    rows, failure = groups.broadcast_object((cache.rows if cache else {}, failure))
    if failure:
        raise ReferenceError(failure)
    return cache, rows


def _append(cache: ReferenceCache | None, computed: dict[str, Sums], groups: Groups) -> None:
    failure = None
    if cache is not None:
        try:
            cache.append(computed)
        except OSError as error:
            failure = f"reference log-probs cannot be written: {error}"
    if failure := groups.broadcast_object(failure):
        raise ReferenceError(failure)


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
        names = ("the chosen response", "the rejected response") if len(fresh) == 2 else ("the response",)
        for name, old, new in zip(names, rows[key][: len(fresh)], fresh, strict=True):
            if not abs(old - new) <= absolute + relative * abs(new):
                raise ReferenceError(
                    f"reference cache: {name} of {keyed[key].kind} {keyed[key].id!r} has log-prob {old:.6f} on disk, "
                    f"the reference model says {new:.6f}; the cache was made by other code or settings: delete it"
                )
