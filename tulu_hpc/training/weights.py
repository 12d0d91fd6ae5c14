"""The weights a run starts from: a Hugging Face directory, or a checkpoint that `convert import` made of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.build import unwrap
from tulu_hpc.models.convert import load_hf
from tulu_hpc.models.model_files import is_imported, read_record, verify_files
from tulu_hpc.models.names import SCORE
from tulu_hpc.parallel.layout import Groups


def load_pretrained(
    chunks: Sequence[Any], path: Path, architecture: Architecture, groups: Groups, *, new_head_seed: int | None = None
) -> None:
    """Fill this rank's model chunks. Collective.

    Every file of an imported checkpoint is compared with its checksum first, the ranks sharing the files.

    Args:
        new_head_seed: as in `load_hf`.

    Raises:
        ValueError: on every rank; damaged or missing files, or a Hugging Face directory that is not the model.
    """
    if not is_imported(path):
        load_hf(chunks, path, architecture, groups, new_head_seed=new_head_seed)
        return
    record = read_record(path)
    if unwrap(chunks[0]).head == "value" and SCORE not in record["tensors"]:
        hint = "" if new_head_seed is None else "; for a new head on it give the Hugging Face directory"
        raise ValueError(f"{path}: has no {SCORE}: it is a language model, not a reward model{hint}")
    if unwrap(chunks[0]).head == "logprobs" and SCORE in record["tensors"]:
        raise ValueError(f"{path}: has {SCORE}: it is a reward model, not a language model")
    names = sorted(record["files"])
    mine = verify_files(path, names[groups.rank :: groups.world_size])
    problems = [f"{name}: {what}" for share in groups.all_gather_object(mine) for name, what in share.items()]
    if problems:
        raise ValueError(f"{path}: damaged: {'; '.join(sorted(problems)[:3])} ({len(problems)} files)")
    load_weights(chunks, path)


def load_weights(models: Sequence[Any], path: Path) -> None:
    """Load only the model from a checkpoint, written by any layout; collective, not verified."""
    metadata = {"singleton_local_shards": False}
    request = {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}
    loaded = dist_checkpointing.load(request, str(path))
    for index, model in enumerate(models):
        model.load_state_dict(loaded[f"model{index}"])
