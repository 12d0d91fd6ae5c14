"""Which samples each optimizer step trained on, written by the data-parallel ranks as they go, and the proof from it
that no sample was left out or seen twice.

    {run.dir}/samples/items.txt                       one id per line: the data set, in its order
    {run.dir}/samples/from_00000000_dp_00000.jsonl    {"step": 1, "batch": 16, "ids": [...]} of one rank, one start

A line is taken from the packs that were trained on, not from the plan that made them. What a start wrote beyond the
checkpoint that the next start continues from is removed by that next start: those steps are done again. A step that was
left out as a spike of the gradient norm has `"left_out": true`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tulu_hpc.telemetry.files import write_atomically

ITEMS = "items.txt"


class SampleAuditError(ValueError):
    """The log does not show every sample once per epoch, or is of other data."""


def begin(directory: Path, item_ids: Sequence[str], *, resume_step: int) -> bool:
    """Prepare the directory for a start at `resume_step` (steps done so far). One process calls it, before the others
    open their logs.

    Returns:
        Whether a log is to be kept: not for a run whose first steps were not logged, which could prove nothing.

    Raises:
        SampleAuditError: the directory belongs to other data.
    """
    file = directory / ITEMS
    if resume_step and not file.is_file():
        return False
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{each}\n" for each in item_ids)
    if file.is_file():
        if file.read_text() != text:
            raise SampleAuditError(f"{file}: holds the ids of other data; remove {directory} or give another run.dir")
    else:
        write_atomically(file, text)
    for log in _logs(directory):
        lines = log.read_text().splitlines(keepends=True)
        kept = [line for line in lines if (row := _row(line)) is not None and row["step"] <= resume_step]
        if len(kept) < len(lines):
            write_atomically(log, "".join(kept)) if kept else log.unlink()
    return True


class SampleLog:
    """Appends one line per step; a context manager. `enabled=False` writes nothing."""

    def __init__(self, directory: Path, *, dp_rank: int, resume_step: int, enabled: bool = True) -> None:
        self._stream: IO[str] | None = None
        if enabled:
            self._stream = (directory / f"from_{resume_step:08d}_dp_{dp_rank:05d}.jsonl").open("a")

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def write(self, step: int, ids: Sequence[str], *, batch: int, left_out: bool = False) -> None:
        """Note the samples of one rank's packs; `batch` is the size of the global batch, `left_out`: nothing was learnt
        from it."""
        if self._stream is not None:
            row = {"step": step, "batch": batch, "ids": list(ids)}
            self._stream.write(json.dumps({**row, "left_out": True} if left_out else row) + "\n")
            self._stream.flush()


@dataclass(frozen=True)
class SampleAudit:
    """What a complete log shows.

    steps: optimizer steps. samples: samples trained on, repetitions counted. items: size of the data set.
    least, most: how often a sample of the data set was seen. left_out: samples of steps that were left out as spikes,
        also counted in the others.
    """

    steps: int
    samples: int
    items: int
    least: int
    most: int
    left_out: int = 0

    def __str__(self) -> str:
        often = f"{self.least} times" if self.least == self.most else f"{self.least} or {self.most} times"
        text = f"{self.steps} steps trained on {self.samples} samples: each of {self.items} was seen {often}"
        return f"{text}; {self.left_out} of them in steps left out as spikes" if self.left_out else text


def audit(directory: Path) -> SampleAudit:
    """Check a log.

    At the end of every epoch and of the run, each sample has been seen as often as any other, or once less (an epoch
    that has begun). Rows of equal content have equal ids and are counted together.

    Raises:
        FileNotFoundError: there is no log.
        SampleAuditError: a step is missing or its batch incomplete, or a sample was dropped, repeated or unknown; it
            names step and sample.
    """
    file = directory / ITEMS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no sample log; the run had train.sample_log false or did not start")
    known = Counter(file.read_text().splitlines())
    steps: dict[int, list[dict[str, Any]]] = {}
    for log in _logs(directory):
        for number, line in enumerate(log.read_text().splitlines(), 1):
            if (row := _row(line)) is None:
                raise SampleAuditError(f"{log}:{number}: is cut off; the run was killed and not continued")
            steps.setdefault(row["step"], []).append(row)
    items, taken, epochs, left_out = known.total(), 0, 0, 0
    seen: Counter[str] = Counter()
    for expected, step in enumerate(sorted(steps), 1):
        if step != expected:
            raise SampleAuditError(f"{directory}: step {expected} is missing")
        batch = {row["batch"] for row in steps[step]}
        ids = [each for row in steps[step] for each in row["ids"]]
        if batch != {len(ids)}:
            raise SampleAuditError(f"{directory}: step {step} trained on {len(ids)} samples of a batch of {batch}")
        if unknown := next((each for each in ids if each not in known), None):
            raise SampleAuditError(f"{directory}: step {step} trained on {unknown}, which is not in the data")
        seen.update(ids)
        taken += len(ids)
        left_out += sum(len(row["ids"]) for row in steps[step] if row.get("left_out"))
        if taken // items > epochs:
            epochs = taken // items
            _check_counts(directory, known, seen, taken, step)
    _check_counts(directory, known, seen, taken, len(steps))
    return SampleAudit(len(steps), taken, items, taken // items, -(-taken // items), left_out)


def _check_counts(directory: Path, known: Counter[str], seen: Counter[str], taken: int, step: int) -> None:
    least, most = taken // known.total(), -(-taken // known.total())
    for name, copies in known.items():
        if not least * copies <= seen[name] <= most * copies:
            raise SampleAuditError(
                f"{directory}: after step {step}, {name} was seen {seen[name]} times instead of "
                f"{least * copies} to {most * copies}"
            )


def _logs(directory: Path) -> list[Path]:
    return sorted(directory.glob("from_*_dp_*.jsonl"))


def _row(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:  # half a line: the process was killed while writing it
        return None
    return row
