"""Where the figures of a run go: `metrics.jsonl` always, TensorBoard by default, Weights & Biases on request.

A line of `metrics.jsonl` is one flat object: `step` (int), `time` (seconds since the epoch) and the metrics by name.
JSON has no NaN or infinity, so these are the strings "NaN", "Infinity" and "-Infinity" there (`float()` reads them).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO


class TelemetryError(ValueError):
    """A sink that was asked for cannot be used, or a metrics file cannot be read."""


class RunPaths(Protocol):
    """The part of a run directory that the sinks need."""

    @property
    def root(self) -> Path: ...
    @property
    def metrics(self) -> Path: ...
    @property
    def events(self) -> Path: ...


class MetricLogger:
    """Writes one record per step to every sink; a resumed run carries on after `resume_step` without duplicates.

    Args:
        run_dir: gives `metrics` (file), `events` (directory) and `root` (W&B's local files).
        enabled: False on every rank but the main one: nothing is opened and `log` does nothing.
        resume_step: last step that the checkpoint holds, 0 for a run from the start. Later lines (and a line cut off by
            a crash) are removed from `metrics.jsonl`; TensorBoard is told to forget later events.
        config: resolved configuration, shown by W&B only.

    Raises:
        TelemetryError: a sink was asked for whose package is missing (the message has the command that installs it).
    """

    def __init__(
        self,
        run_dir: RunPaths,
        *,
        enabled: bool = True,
        tensorboard: bool = True,
        wandb: bool = False,
        resume_step: int = 0,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._file: TextIO | None = None
        self._events: _EventFile | None = None
        self._wandb: Any = None
        if not enabled:
            return
        run_dir.metrics.parent.mkdir(parents=True, exist_ok=True)
        truncate_after(run_dir.metrics, resume_step)
        # Line buffered: a killed run keeps every finished step, and `tail -f` works.
        self._file = run_dir.metrics.open("a", buffering=1, encoding="utf-8")
        if tensorboard:
            self._events = _EventFile(run_dir.events, first_step=resume_step + 1)
        if wandb:
            self._wandb = _start_wandb(run_dir.root, name or run_dir.root.name, config)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record `metrics` (numbers, or tensors of one element) of `step` (counted from 1).

        Raises:
            TelemetryError: a value is not a number, or a name is `step` or `time`.
        """
        if self._file is None:
            return
        values = {key: _number(key, value) for key, value in metrics.items()}
        for reserved in ("step", "time"):
            if reserved in values:
                raise TelemetryError(f"metric {reserved!r}: the name is reserved")
        now = time.time()
        record = {"step": step, "time": round(now, 3), **{key: _to_json(value) for key, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._events is not None:
            self._events.scalars(step, now, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def truncate_after(path: Path, step: int) -> int:
    """Cut `path` at the first line that is later than `step` or was not finished; return the bytes removed.

    Raises:
        TelemetryError: a line other than the last is not a record (the file is then not ours to cut).
    """
    if not path.exists():
        return 0
    keep = 0
    with path.open("rb") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, start=1):
        finished = line.endswith(b"\n")
        try:
            record_step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise TelemetryError(f"{path}:{number}: not a metrics record ({error})") from error
        if record_step > step or not finished:
            break
        keep += len(line)
    removed = path.stat().st_size - keep
    if removed:
        os.truncate(path, keep)
    return removed


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a metrics file in order, every value a float; a last line cut off by a crash is left out.

    Raises:
        TelemetryError: the file is missing or a line before the last is not a record.
    """
    if not path.is_file():
        raise TelemetryError(f"{path}: not found (it is written by the training verbs)")
    records: list[dict[str, float]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append({key: float(value) for key, value in json.loads(line).items()})
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise TelemetryError(f"{path}:{number}: not a metrics record ({error})") from error
    return records


def _number(key: str, value: Any) -> int | float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return value
    raise TelemetryError(f"metric {key!r}: {type(value).__name__} is not a number")


def _to_json(value: int | float) -> int | float | str:
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


class _EventFile:
    """A TensorBoard event file, written with tensorboard's own protocol buffers and record framing.

    tensorboard's `EventFileWriter` opens files through TensorFlow where that is installed (seconds of start-up), so the
    record writer is given a plain file here.
    """

    def __init__(self, directory: Path, *, first_step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise TelemetryError(
                "telemetry.tensorboard needs the tensorboard package: pip install tensorboard "
                "(or set telemetry.tensorboard=false)"
            ) from error
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = path.open("ab")
        self._records = RecordWriter(self._file)
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        # START at a step makes readers drop what an earlier attempt wrote at this step or later.
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self._event(wall_time=time.time(), step=first_step, session_log=session))

    def scalars(self, step: int, wall_time: float, values: Mapping[str, int | float]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=key, simple_value=float(value)) for key, value in values.items()]
        )
        self._write(self._event(wall_time=wall_time, step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _start_wandb(directory: Path, name: str, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise TelemetryError(
            "telemetry.wandb needs the wandb package: pip install 'tulu-hpc[wandb]' (or set telemetry.wandb=false)"
        ) from error
    # The id comes from the directory, so that a resumed run continues its own page.
    run_id = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"id": run_id, "resume": "allow", "name": name, "dir": str(directory)}
    return wandb.init(project=os.environ.get("WANDB_PROJECT", "tulu-hpc"), config=dict(config or {}), **settings)
