"""A trainer whose state belongs to the checkpoints of another one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tulu_hpc.training.trainer import Trainer


@dataclass(frozen=True)
class Partner:
    """Saved in the same step directory and published by the same rename: a resume finds both of one step or neither.

    Attributes:
        name: of the subdirectory.
        active: around everything that touches the trainer (`parallel.second_layout`).
    """

    name: str
    trainer: Trainer
    active: Callable[[], AbstractContextManager[None]] = nullcontext
