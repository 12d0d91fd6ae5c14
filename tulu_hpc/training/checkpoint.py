"""Checkpoints that are complete or do not exist: model, optimizer, generators and the position of the run.

    checkpoints/step_N/   torch_dist files of megatron-core (any layout reads them), trainer_state.json,
                          manifest.json (size and xxh3-128 of every other file)

A checkpoint is written to `step_N.tmp`, synced to disk and renamed, so that a kill at any moment leaves either the old
state or the new one. What is loaded has been compared with its manifest; what does not match is passed over, aloud.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from tulu_hpc.models.safetensors_files import sync_to_disk
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.training import determinism
from tulu_hpc.training.optimizer import optimizer_step, unshare_steps
from tulu_hpc.training.save_strategy import InProcessSave
from tulu_hpc.training.trainer import Trainer

FORMAT = 1
STATE, MANIFEST = "trainer_state.json", "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or does not belong to this model."""


def save(trainer: Trainer, directory: Path, extra: dict[str, Any], *, keep_last: int = 2) -> Path:
    """Write `directory/step_N` (N = trainer.step) and delete all but the newest `keep_last`. Collective.

    Args:
        extra: JSON-able state of the caller (loader position, ...), returned by `load_latest`.
    """
    groups = trainer.groups
    final = directory / f"step_{trainer.step}"
    partial = directory / f"step_{trainer.step}.tmp"
    if groups.is_main:
        _remove_leftovers(directory)
        partial.mkdir(parents=True)
    groups.barrier()
    trainer.synchronise_parameters()
    dist_checkpointing.save(_state(trainer, loading=False), str(partial), InProcessSave(groups))
    if groups.is_main:
        state = {
            "format": FORMAT,
            "step": trainer.step,
            "world_size": groups.world_size,
            "layout": _layout(groups),
            "extra": extra,
        }
        _write(partial / STATE, state)
    groups.barrier()
    hashes = _hashes(partial, _files(partial), groups)
    if groups.is_main:
        _write(partial / MANIFEST, {"format": FORMAT, "step": trainer.step, "files": hashes})
        sync_to_disk(partial)
        if final.exists():  # saved before, then resumed from an older one
            _discard(final)
        partial.rename(final)
        sync_to_disk(directory)
        for step in valid_steps(directory)[:-keep_last]:
            _discard(directory / f"step_{step}")
    groups.barrier()
    return final


def load_latest(trainer: Trainer, directory: Path) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest undamaged checkpoint; None if there is none. Collective.

    Returns:
        (step, extra) as given to `save`.

    Raises:
        CheckpointError: checkpoints exist but every one is damaged.
    """
    groups = trainer.groups
    steps = groups.broadcast_object(valid_steps(directory) if groups.is_main else None)
    for step in reversed(steps):
        problem = verify(directory / f"step_{step}", groups)
        if problem is None:
            return load(trainer, directory / f"step_{step}")
        if groups.is_main:
            print(f"checkpoint passed over: {problem}", file=sys.stderr, flush=True)
    if steps:
        raise CheckpointError(f"{directory}: none of the checkpoints {steps} is intact; move them away to start anew")
    return None


def load(trainer: Trainer, path: Path) -> tuple[int, dict[str, Any]]:
    """Restore one checkpoint into a trainer of any layout (bit for bit into the same one). Collective; not verified.

    Raises:
        CheckpointError: it was written for another model, or by another format.
    """
    groups = trainer.groups
    state = json.loads((path / STATE).read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path / STATE}: format {state['format']}, this version reads {FORMAT}")
    same_layout = state["world_size"] == groups.world_size and state["layout"] == _layout(groups)
    request = _state(trainer, loading=True, with_rng=same_layout)
    loaded = dist_checkpointing.load(request, str(path))
    for index, model in enumerate(trainer.models):
        model.load_state_dict(loaded[f"model{index}"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    unshare_steps(trainer.optimizer)
    if same_layout:
        determinism.set_rng_state(loaded["rng"])
    if optimizer_step(trainer.optimizer) != state["step"]:
        raise CheckpointError(
            f"{path}: the optimizer is at step {optimizer_step(trainer.optimizer)}, the run at {state['step']}"
        )
    trainer.step = state["step"]
    return trainer.step, state["extra"]


def valid_steps(directory: Path) -> list[int]:
    """Steps of published checkpoints, ascending (contents not checked)."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if (path / MANIFEST).is_file())
    return sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit())


def verify(path: Path, groups: Groups) -> str | None:
    """What is wrong with the checkpoint, or None. Collective; the ranks share the hashing."""
    try:
        wanted = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{path / MANIFEST}: unreadable ({error})"
    found = _hashes(path, sorted(wanted), groups)
    for name, entry in wanted.items():
        if found[name] is None:
            return f"{path / name}: missing"
        if found[name] != entry:
            return f"{path / name}: {found[name]} does not match the manifest's {entry}"
    return None


def clean(directory: Path, groups: Groups) -> None:
    """Remove what an interrupted save left behind (main process)."""
    if groups.is_main:
        _remove_leftovers(directory)
    groups.barrier()


def _state(trainer: Trainer, *, loading: bool, with_rng: bool = True) -> dict[str, Any]:
    """megatron's sharded state: which part of which global tensor this rank holds."""
    groups = trainer.groups
    metadata = {
        "dp_cp_group": groups.pg.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    models = {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(trainer.models)}
    state: dict[str, Any] = dict(models)
    gc.freeze()  # megatron collects garbage here: 0.2 s over the objects of the imports, which are never garbage
    try:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    finally:
        gc.unfreeze()
    if with_rng:
        rng = None if loading else determinism.rng_state()
        state["rng"] = ShardedObject("rng", rng, (groups.world_size,), (groups.rank,))
    return state


def _layout(groups: Groups) -> dict[str, Any]:
    layout = groups.layout
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "context": layout.context,
    }


def _files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)


def _hashes(path: Path, names: Iterable[str], groups: Groups) -> dict[str, dict[str, Any] | None]:
    """name -> {size, xxh3}, None for a missing file; each rank reads its share, all get the whole."""
    names = list(names)
    mine = {name: _hash(path / name) for name in names[groups.rank :: groups.world_size]}
    return {name: entry for share in groups.all_gather_object(mine) for name, entry in share.items()}


def _hash(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"size": file.stat().st_size, "xxh3": digest.hexdigest()}


def _write(file: Path, value: dict[str, Any]) -> None:
    with file.open("w") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _discard(path: Path) -> None:
    """Delete a checkpoint so that a kill in between does not leave a half one under a valid name."""
    doomed = path.with_name(path.name + ".old.tmp")  # another name than a new one being written
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(directory: Path) -> None:
    if directory.is_dir():
        for path in directory.glob("step_*.tmp"):
            shutil.rmtree(path)


def fingerprint(path: Path) -> str:
    """Hash of everything in a checkpoint, from its manifest."""
    return xxhash.xxh3_128((path / MANIFEST).read_bytes()).hexdigest()
