"""Writing checkpoints: in the background while training goes on, published whole or not at all.

A checkpoint is written to `step_N.tmp`, synced to disk and renamed to `step_N`, so that a kill at any moment leaves
either the old state or the new one. At most one is on its way: each rank's part is a thread's work, `poll` after every
step asks whether all have ended, and then the main process publishes. The last checkpoint of a run, and that of a stop
on request, are waited for.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tulu_hpc.models.checksums import Entry
from tulu_hpc.models.safetensors_files import sync_to_disk
from tulu_hpc.training import checkpoint, determinism
from tulu_hpc.training.partner import Partner
from tulu_hpc.training.preemption import Preempted
from tulu_hpc.training.retention import STATE, Retention, discard, remove_leftovers
from tulu_hpc.training.snapshot import FORMAT, Part, Snapshot, free_bytes, reason, write_manifest
from tulu_hpc.training.step import NonFiniteError, SpikeError
from tulu_hpc.training.trainer import Trainer


class SaveError(RuntimeError):
    """A checkpoint could not be written: file, rank, reason, and the space that was missing."""


class MetricError(ValueError):
    """The metric that decides which checkpoint is the best does not exist."""


@dataclass(frozen=True)
class _Pending:
    step: int
    snapshots: list[Snapshot]  # the trainer's, and one per partner
    parts: Future[list[Part]]  # of this rank, one per snapshot


class Saver:
    """Writes the checkpoints of one run; a context manager around its loop. All methods are collective.

    Args:
        directory: `checkpoints/` of the run.
        background: let training go on while a checkpoint is written, at the price of a copy of what this rank writes
            in host memory.
        on_error: `continue` warns about a checkpoint that could not be written and goes on; those that are waited for
            raise in any case.
        saved_step: where the run was resumed; that step is not saved again.
        partners: trainers whose state is part of every checkpoint, each in a subdirectory.
    """

    def __init__(
        self,
        trainer: Trainer,
        directory: Path,
        *,
        retention: Retention,
        background: bool = True,
        on_error: Literal["raise", "continue"] = "raise",
        saved_step: int | None = None,
        partners: Sequence[Partner] = (),
    ) -> None:
        self._partners = partners
        self._trainer, self._groups, self._directory = trainer, trainer.groups, directory
        self._retention, self._background, self._on_error = retention, background, on_error
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._newest = saved_step
        self._values: list[float] = []

    def __enter__(self) -> Self:
        # A kill may have come between a publication and what follows it.
        self._tidy(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # All ranks are here together, unless an error has hit some of them only.
            if kind is None or issubclass(kind, NonFiniteError | SpikeError | MetricError | Preempted):
                self.wait()
        finally:
            self._pool.shutdown()

    def observe(self, metrics: Mapping[str, float], *, known: Collection[str] = ()) -> None:
        """Note the metrics of a step, for choosing the best checkpoint.

        Args:
            known: names of metrics that the step may have had nothing to count for (a source that is not in it).

        Raises:
            MetricError: the chosen metric is not among those of a step with an update (`eval/`: of a step with an
                evaluation) and is not known; with the names there are.
        """
        name = self._retention.metric
        if name is None:
            return
        if name in metrics:
            self._values.append(float(metrics[name]))
            return
        mark = "eval/" if name.startswith("eval/") else "train/grad_norm"
        if name not in known and any(each.startswith(mark) for each in metrics):
            raise MetricError(f"train.best_metric = {name}: there is no such metric; there are {', '.join(metrics)}")

    def save(self, extra: dict[str, Any], *, wait: bool = False) -> None:
        """Start the checkpoint of the trainer's step, once the one before has been published.

        Args:
            extra: JSON-able state of the caller (loader position, ...), returned by `checkpoint.load_latest`.
            wait: return when it is published.

        Raises:
            SaveError: this one (where waited for) or the one before could not be written.
        """
        trainer = self._trainer
        self.wait()
        if self._newest == trainer.step:
            return
        partial = self._directory / f"step_{trainer.step}.tmp"

        def prepare() -> None:
            remove_leftovers(self._directory)
            partial.mkdir(parents=True)
            for partner in self._partners:
                (partial / partner.name).mkdir()

        failure = self._on_main(prepare)
        if failure is not None:
            self._fail(trainer.step, failure, 0, strict=wait)
            return
        background = self._background and not wait
        snapshots = [self._snapshot(trainer, partial, self._state(extra), hold=background)]
        for partner in self._partners:
            with partner.active():
                state = self._description(partner.trainer)
                snapshots.append(self._snapshot(partner.trainer, partial / partner.name, state, hold=background))

        def write() -> list[Part]:
            return [snapshot.write() for snapshot in snapshots]

        if background:
            parts = self._pool.submit(write)
        else:
            parts = Future()
            parts.set_result(write())
        self._pending, self._newest = _Pending(trainer.step, snapshots, parts), trainer.step
        if not background:
            self.wait(strict=wait)

    def poll(self) -> None:
        """Publish the checkpoint on its way if every rank has written its part.

        Raises:
            SaveError: a rank could not.
        """
        if self._pending is not None and all(self._groups.all_gather_object(self._pending.parts.done())):
            self.wait()

    def wait(self, *, strict: bool = False) -> None:
        """Publish the checkpoint on its way, if there is one, as soon as all ranks have written their parts.

        Args:
            strict: raise also where on_error says `continue`.

        Raises:
            SaveError: a rank could not.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        parts: list[list[Part]] = self._groups.all_gather_object(pending.parts.result())
        failures = ((rank, part.failure) for rank, mine in enumerate(parts) for part in mine if part.failure)
        rank, failure = next(failures, (0, None))
        if failure is None:
            failure = self._on_main(lambda: self._publish(pending, parts))
        if failure is not None:
            needed = sum(snapshot.bytes_all for snapshot in pending.snapshots)
            self._fail(pending.step, failure, rank, needed=needed, strict=strict)
        else:
            self._tidy(pending.step)

    def _snapshot(self, trainer: Trainer, directory: Path, state: dict[str, Any], *, hold: bool) -> Snapshot:
        trainer.synchronise_parameters()
        tensors = checkpoint.sharded_state(trainer, loading=False)
        plain = {STATE: json.dumps(state, indent=1).encode()}
        return Snapshot.take(tensors, directory, plain, trainer.groups, hold=hold)

    def _publish(self, pending: _Pending, parts: list[list[Part]]) -> None:
        partial, final = self._directory / f"step_{pending.step}.tmp", self._directory / f"step_{pending.step}"
        files: dict[str, Entry] = {}
        for index, snapshot in enumerate(pending.snapshots):
            within = snapshot.directory.relative_to(partial)
            sealed = snapshot.seal([mine[index] for mine in parts])
            files |= {str(within / name): entry for name, entry in sealed.items()}
        write_manifest(partial, pending.step, files)
        if final.exists():  # saved before, then resumed from an older one
            discard(final)
        partial.rename(final)
        sync_to_disk(self._directory)

    def _tidy(self, newest: int | None) -> None:
        failure = self._on_main(lambda: self._retention.apply(self._directory, newest=newest))
        if failure is not None:
            self._raise_or_warn(f"older checkpoints could not be removed: {failure[0]}: {failure[1]}")

    def _state(self, extra: dict[str, Any]) -> dict[str, Any]:
        values, self._values = self._values, []
        score = {"metric": self._retention.metric, "value": sum(values) / len(values)} if values else None
        return self._description(self._trainer) | {"score": score, "extra": extra}

    def _description(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": trainer.step,
            "world_size": trainer.groups.world_size,
            "layout": checkpoint.layout_keys(trainer.groups),
            "generators": determinism.fingerprint(),
            "score": None,
            "trainer": trainer.state_dict(),
            "extra": {},
        }

    def _on_main(self, action: Any) -> tuple[str, str] | None:
        """Do it on the main process; (file, reason) on all ranks if the operating system refused."""
        failure = None
        if self._groups.is_main:
            try:
                action()
            except OSError as error:
                failure = (str(error.filename or self._directory), reason(error))
        answer: tuple[str, str] | None = self._groups.broadcast_object(failure)
        return answer

    def _fail(self, step: int, failure: tuple[str, str], rank: int, *, needed: int = 0, strict: bool = False) -> None:
        """Remove the half-written checkpoint, then raise or warn."""
        self._newest, text = None, None
        if self._groups.is_main:
            shutil.rmtree(self._directory / f"step_{step}.tmp", ignore_errors=True)
            file, why = failure
            text = f"checkpoint step_{step} could not be written: {file}: {why} (rank {rank}){self._space(needed)}"
        self._raise_or_warn(str(self._groups.broadcast_object(text)), strict=strict)

    def _raise_or_warn(self, text: str, *, strict: bool = False) -> None:
        """With the same words on every rank."""
        if strict or self._on_error == "raise":
            raise SaveError(text)
        if self._groups.is_main:
            print(f"warning: {text}; training goes on", file=sys.stderr, flush=True)

    def _space(self, needed: int) -> str:
        try:
            free = free_bytes(self._directory)
        except OSError:
            return ""
        if needed <= free:
            return ""
        return f"; it needs {needed:,} bytes, {free:,} are free: {needed - free:,} bytes more are needed"


def save(trainer: Trainer, directory: Path, extra: dict[str, Any], *, keep_last: int = 2) -> Path:
    """Write one checkpoint and wait for it; its directory. Collective."""
    with Saver(trainer, directory, retention=Retention(last=keep_last), background=False) as saver:
        saver.save(extra, wait=True)
    return directory / f"step_{trainer.step}"
