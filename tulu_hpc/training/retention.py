"""Which published checkpoints stay: the newest, and the best by a metric; `best` links to the best of all."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tulu_hpc.training.snapshot import MANIFEST

STATE = "trainer_state.json"
BEST = "best"


@dataclass(frozen=True)
class Retention:
    """What to keep.

    Attributes:
        last: newest checkpoints.
        best: further ones, with the best values of `metric`; these are never removed by `last`.
        metric: as in metrics.jsonl; its mean over the logged steps since the checkpoint before is what counts.
    """

    last: int = 2
    best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"

    def ranked(self, directory: Path) -> list[int]:
        """Steps of the checkpoints that have a value of `metric`, the best first; of equals the older one."""
        values = {step: score(directory / f"step_{step}", self.metric) for step in valid_steps(directory)}
        known = {step: value for step, value in values.items() if value is not None and math.isfinite(value)}
        sign = 1 if self.mode == "min" else -1
        return sorted(known, key=lambda step: (sign * known[step], step))

    def apply(self, directory: Path, *, newest: int | None = None) -> None:
        """Point `best` to the best checkpoint, then delete what is not to be kept (main process).

        Args:
            newest: a step that stays in any case.
        """
        if not directory.is_dir():
            return
        steps, best = valid_steps(directory), self.ranked(directory)[: self.best] if self.best else []
        link = directory / BEST
        if best:
            if not link.is_symlink() or os.readlink(link) != f"step_{best[0]}":
                partial = directory / f"{BEST}.tmp"
                partial.unlink(missing_ok=True)
                partial.symlink_to(f"step_{best[0]}")
                partial.replace(link)
        elif link.is_symlink():
            link.unlink()
        kept = {*steps[-self.last :], *best, newest}
        for step in steps:
            if step not in kept:
                discard(directory / f"step_{step}")


def score(path: Path, metric: str | None) -> float | None:
    """The value of `metric` that a checkpoint was saved with, None if it has none or cannot be read."""
    try:
        noted = json.loads((path / STATE).read_text())["score"]
        return float(noted["value"]) if noted is not None and noted["metric"] == metric else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def valid_steps(directory: Path) -> list[int]:
    """Steps of published checkpoints, ascending (contents not checked)."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if (path / MANIFEST).is_file())
    return sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit())


def discard(path: Path) -> None:
    """Delete a checkpoint so that a kill in between does not leave a half one under a valid name."""
    doomed = path.with_name(path.name + ".old.tmp")  # another name than a new one being written
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Move a damaged checkpoint out of the way, under a name that no save and no load takes for one."""
    aside = path.with_name(path.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    return aside


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted save or deletion left behind (main process)."""
    if directory.is_dir():
        for path in directory.glob("step_*.tmp"):
            shutil.rmtree(path)
