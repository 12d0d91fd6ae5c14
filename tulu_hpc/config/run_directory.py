"""The directory of one run: where its files lie, and the check that a resumed run is the same run."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from tulu_hpc.config.loader import ConfigError, dump_yaml, flatten, load_config
from tulu_hpc.config.sections import RunSection

RESOLVED_CONFIG = "config.resolved.yaml"

# Keys that change neither the numbers nor their meaning; `x.*` is a whole section.
MAY_DIFFER: tuple[str, ...] = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.context_split",
    "parallel.sequence",
    "parallel.overlap_*",
    "parallel.distributed_optimizer",
    "parallel.account_for_*",
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "parallel.gradient_bucket_size",
    "parallel.tp_comm_overlap",
    "telemetry.*",
    "train.log_every",
    "train.save_every",
    "train.keep_last",
    "train.preview_rows",
    "train.keep_best",
    "train.best_*",
    "train.async_save",
    "train.on_save_error",
    "train.nan_watch",
    "train.export_hf",
    "model.logprob_buffer_mib",
    "rollout.vllm.*",
    "rollout.mismatch_*",
    "verifier.workers",
    "verifier.max_lost_share",
    "run.name",
    "run.threads",
    "run.gpus",
    "run.dir",
    "run.root",
    "run.distributed_timeout_minutes",
)


class HasRun(Protocol):
    """A configuration with a `run` section; all verbs' configurations are pydantic models with one."""

    @property
    def run(self) -> RunSection: ...


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run. Everything a resumed run needs lies below `root`.

    `stop_requested` is created by whoever wants the run to save and stop after its current step (the batch script does
    so before the time limit); `preempted` is created by the run once that checkpoint is complete.
    """

    root: Path

    @property
    def resolved_config(self) -> Path:
        return self.root / RESOLVED_CONFIG

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def masks(self) -> Path:
        return self.root / "masks.html"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def stop_requested(self) -> Path:
        return self.root / "stop_requested"

    @property
    def preempted(self) -> Path:
        return self.root / "preempted"

    @classmethod
    def open(
        cls,
        config: HasRun,
        *,
        verb: str,
        is_main: bool = True,
        broadcast: Callable[[str], str] = lambda text: text,
        may_differ: Collection[str] = MAY_DIFFER,
    ) -> RunDirectory:
        """Create the directory, or reopen it after checking that the configuration is the one it was started with.

        Collective: every process calls it. The main process chooses the name, writes and compares; `broadcast` gives
        its answer (its argument on the main process) to all, so that a refusal is raised everywhere instead of leaving
        the others waiting.

        Raises:
            ConfigError: the directory holds a run with other settings; each differing key is listed with both values.
        """
        answer = {"dir": "", "error": ""}
        if is_main:
            try:
                answer["dir"] = str(_prepare(config, verb, may_differ))
            except (ConfigError, OSError) as error:
                answer["error"] = str(error)
        answer = json.loads(broadcast(json.dumps(answer)))
        if answer["error"]:
            raise ConfigError(answer["error"])
        return cls(Path(answer["dir"]))


def new_run_path(root: str, verb: str) -> str:
    """`{root}/{verb}-{date}-{time}-{4 hex}`: sortable by start, unique among jobs that start in the same second."""
    return f"{root}/{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def differences(old: BaseModel, new: BaseModel, may_differ: Collection[str]) -> list[str]:
    """`key: old -> new` for every key outside `may_differ` whose values differ."""
    before, after = (dict(flatten(config.model_dump(mode="json"))) for config in (old, new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not any(fnmatchcase(key, pattern) for pattern in may_differ)
    ]


def _prepare(config: HasRun, verb: str, may_differ: Collection[str]) -> Path:
    if not isinstance(config, BaseModel):
        raise TypeError(f"expected a configuration model, got {type(config).__name__}")
    path = Path(config.run.dir or new_run_path(config.run.root, verb))
    resolved = path / RESOLVED_CONFIG
    if resolved.exists():
        try:
            old = load_config(resolved, [], type(config))
        except ConfigError as error:
            raise ConfigError(f"{path}: was not made by `{verb}` with this version: {error}") from error
        changed = differences(old, config, may_differ)
        if changed:
            raise ConfigError(
                f"{path}: holds a run with another configuration; give another run.dir or the old values: "
                + "; ".join(changed)
            )
    path.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that a kill never leaves half a file that would block the next start.
    temporary = path / f".{RESOLVED_CONFIG}.{os.getpid()}"
    temporary.write_text(dump_yaml(config), encoding="utf-8")
    temporary.replace(resolved)
    return path
