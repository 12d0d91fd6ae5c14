"""Reading checkpoints: model, optimizer, generators and the position of the run. `saver` writes them.

    checkpoints/step_N/   torch_dist files of megatron-core (any layout reads them), trainer_state.json,
                          manifest.json (size and xxh3-128 of every other file)
    checkpoints/step_N/NAME/   the same of a partner (`partner.py`), under the same manifest

What is loaded has been compared with its manifest; what does not match is passed over, aloud.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from tulu_hpc.models.checksums import Entry, file_entry
from tulu_hpc.parallel.failures import shared_writing
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.training import determinism, optimizer_form
from tulu_hpc.training.optimizer import optimizer_step, unshare_steps
from tulu_hpc.training.partner import Partner
from tulu_hpc.training.retention import STATE, remove_leftovers, set_aside, valid_steps
from tulu_hpc.training.snapshot import FORMAT, MANIFEST
from tulu_hpc.training.trainer import Trainer


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or does not belong to this model."""


def load_latest(
    trainer: Trainer, directory: Path, partners: Sequence[Partner] = ()
) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest undamaged checkpoint, that of `partners` with it; None if there is none. Collective.

    Newer ones that are damaged are renamed to `step_N.damaged`, and standard error says so.

    Returns:
        (step, extra) as given to `Saver.save`.

    Raises:
        CheckpointError: checkpoints exist but every one is damaged, or the one used has nothing of a partner.
    """
    groups = trainer.groups
    steps: list[int] = groups.broadcast_object(valid_steps(directory) if groups.is_main else None)
    problems: dict[int, str] = {}
    for step in reversed(steps):
        problem = verify(directory / f"step_{step}", groups)
        if problem is None:
            with shared_writing(groups, f"{directory} (a checkpoint set aside)"):
                if groups.is_main:
                    _report(directory, problems, step)
            return _load_all(trainer, partners, directory / f"step_{step}")
        problems[step] = problem
    if steps:
        raise CheckpointError(
            f"{directory}: none of the checkpoints {steps} is intact; move them away to start anew: "
            + "; ".join(problems.values())
        )
    return None


def _report(directory: Path, problems: dict[int, str], used: int) -> None:
    for step, problem in problems.items():
        aside = set_aside(directory / f"step_{step}")
        print(
            f"warning: checkpoint passed over: {problem}; it is now {aside}, the run goes on from step {used}",
            file=sys.stderr,
            flush=True,
        )


def _load_all(trainer: Trainer, partners: Sequence[Partner], path: Path) -> tuple[int, dict[str, Any]]:
    for partner in partners:
        if not (path / partner.name / STATE).is_file():
            raise CheckpointError(f"{path}: holds no {partner.name}: it was saved by another kind of run")
        with partner.active():
            load(partner.trainer, path / partner.name)
    return load(trainer, path)


def load(trainer: Trainer, path: Path) -> tuple[int, dict[str, Any]]:
    """Restore one checkpoint into a trainer of any layout (bit for bit into the same one). Collective; not verified.

    Raises:
        CheckpointError: it was written for another model, or by another format.
    """
    groups = trainer.groups
    state = json.loads((path / STATE).read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path / STATE}: format {state['format']}, this version reads {FORMAT}")
    same_layout = state["world_size"] == groups.world_size and state["layout"] == layout_keys(groups)
    request = sharded_state(trainer, loading=True, with_rng=same_layout)
    distributed = optimizer_form.is_distributed(trainer.optimizer)
    other_form = optimizer_form.saved_by_distributed(path) != distributed
    bf16 = trainer.optimizer.chained_optimizers[0].config.bf16
    if other_form:
        optimizer_form.ask_for_other(
            request["optimizer"], distributed=distributed, bf16=bf16, sgd=optimizer_form.is_sgd(trainer.optimizer)
        )
    loaded = dist_checkpointing.load(request, str(path))
    for index, model in enumerate(trainer.models):
        model.load_state_dict(loaded[f"model{index}"])
    if other_form:
        optimizer_form.convert(loaded["optimizer"], trainer.optimizer, bf16=bf16)
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    unshare_steps(trainer.optimizer)
    if same_layout:
        determinism.set_rng_state(loaded["rng"])
    else:
        determinism.seed_all(state["generators"])
    trainer.load_state_dict(state["trainer"])
    if optimizer_step(trainer.optimizer) + trainer.spikes.skipped != state["step"]:
        raise CheckpointError(
            f"{path}: the optimizer is at step {optimizer_step(trainer.optimizer)}, the run at {state['step']} with "
            f"{trainer.spikes.skipped} steps left out"
        )
    trainer.step = state["step"]
    return trainer.step, state["extra"]


def verify(path: Path, groups: Groups) -> str | None:
    """What is wrong with the checkpoint, or None. Collective; the ranks share the hashing."""
    wanted, problem = groups.broadcast_object(_read_manifest(path) if groups.is_main else None)
    if problem is not None:
        return str(problem)
    found = _hashes(path, sorted(wanted), groups)
    for name, entry in wanted.items():
        if isinstance(found[name], str):
            return f"{path / name}: {found[name]}"
        if found[name] != entry:
            return f"{path / name}: {found[name]} does not match the manifest's {entry}"
    return None


def _read_manifest(path: Path) -> tuple[dict[str, Entry], str | None]:
    try:
        return dict(json.loads((path / MANIFEST).read_text())["files"]), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"{path / MANIFEST}: unreadable ({error})"


def clean(directory: Path, groups: Groups) -> None:
    """Remove what an interrupted save left behind (main process)."""
    with shared_writing(groups, f"{directory} (leftovers to be removed)"):
        if groups.is_main:
            remove_leftovers(directory)


def sharded_state(trainer: Trainer, *, loading: bool, with_rng: bool = True) -> dict[str, Any]:
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


def layout_keys(groups: Groups) -> dict[str, Any]:
    """What two layouts must share for each rank to hold the same part of the state."""
    layout = groups.layout
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "context": layout.context,
    }


def _hashes(path: Path, names: list[str], groups: Groups) -> dict[str, Entry | str]:
    """name -> manifest entry, or why there is none; each rank reads its share, all get the whole."""
    mine = {name: _hash(path / name) for name in names[groups.rank :: groups.world_size]}
    return {name: entry for share in groups.all_gather_object(mine) for name, entry in share.items()}


def _hash(file: Path) -> Entry | str:
    try:
        return file_entry(file)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror})"


def fingerprint(path: Path) -> str:
    """Hash of everything in a checkpoint, from its manifest."""
    return xxhash.xxh3_128((path / MANIFEST).read_bytes()).hexdigest()
