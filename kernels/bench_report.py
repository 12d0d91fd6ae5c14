"""Goals with verdicts, and the tables of a benchmark on the screen, as Markdown and as JSON."""

import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch

from tulu_hpc.kernels.contest import FAILED, OURS
from tulu_hpc.kernels.timing import REHEARSAL, Run, Shape, Tables, parser, start

NOT_MEASURED = "not measured"
_DISTRIBUTIONS = (
    *("triton", "liger-kernel", "cut-cross-entropy", "transformer-engine"),
    *("flash-attn", "flash_attn_3", "flash-attn-4"),
)
Line = Mapping[str, Any]


class Goal(NamedTuple):
    """A figure of the run beside its goal. device: "cpu", or the GPU that the goal was set for."""

    device: str
    figure: str
    sign: str  # "≥", "≤" or "="
    limit: float
    value: float | None

    def row(self, run_device: str, measures: bool) -> dict[str, Any]:
        """Columns figure, goal, value, verdict; without a value of this device it is not measured."""
        here = "cpu" if run_device == "cpu" else "cuda"
        value = self.value if measures and here == ("cpu" if self.device == "cpu" else "cuda") else None
        verdict = NOT_MEASURED
        if value is not None:
            met = {"≥": value >= self.limit, "≤": value <= self.limit, "=": value == self.limit}[self.sign]
            verdict = "met" if met else "missed"
            if self.device not in run_device:
                verdict += f" on {run_device}"
        return {"figure": f"{self.device}: {self.figure}", "goal": f"{self.sign} {self.limit:g}", "value": value} | {
            "verdict": verdict
        }


def worst(values: Iterable[float | None], pick: Callable[[Sequence[float]], float] = min) -> float | None:
    """The smallest (or `pick`) of all values; None if there are none or one of them was not measured."""
    found = list(values)
    known = [value for value in found if value is not None]
    return pick(known) if known and len(known) == len(found) else None


def select(table: Iterable[Line], **columns: Any) -> list[Line]:
    """The lines in which every named column has the value given."""
    return [line for line in table if all(line.get(name) == value for name, value in columns.items())]


def one(table: Iterable[Line], column: str, **columns: Any) -> float | None:
    """A column of the first line that `select` finds; None if there is no such line or it was not measured."""
    return next((line[column] for line in select(table, **columns)), None)


def launch(
    name: str,
    description: str | None,
    arguments: list[str] | None,
    tables: Tables[Shape],
    measure: Callable[[Shape, Run], list[dict[str, Any]]],
    goals: Callable[[list[dict[str, Any]]], list[Goal]] | None = None,
) -> None:
    """A whole benchmark: the lines of every shape that the command line asks for, the goals, and `report`."""
    run = start(parser(description).parse_args(arguments))
    table = lines_of(name, run, run.table(tables), measure)
    report(name, run, table, [] if goals is None else goals(table))


def lines_of(
    name: str, run: Run, shapes: Sequence[Shape], measure: Callable[[Shape, Run], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The lines of all shapes; stderr says how far it is, which can take half an hour."""
    table = []
    for number, shape in enumerate(shapes, 1):
        print(f"{name}: shape {number} of {len(shapes)}, {shape.label}", file=sys.stderr, flush=True)
        table += measure(shape, run)
    return table


def report(name: str, run: Run, table: Sequence[Line], goals: Sequence[Goal]) -> None:
    """Prints the table, the goals and, as the last line, everything as one JSON object; writes the files asked for.

    Raises:
        SystemExit: one of our own kernels failed (after all is written).
    """
    device = torch.cuda.get_device_name() if run.device == "cuda" else "cpu"
    result: dict[str, Any] = {
        "benchmark": name,
        "mode": run.mode,
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "dtype": str(run.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "gemm_TFLOP/s": run.gemm,
        "copy_GB/s": run.copy,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": _versions(),
        "goals": [goal.row(device, run.mode != REHEARSAL) for goal in goals],
        "lines": list(table),
    }
    if run.mode == REHEARSAL:
        print("A rehearsal: every script and contestant is tried at small shapes; the times mean nothing.")
    print(f"ceilings: GEMM {run.gemm:.3g} TFLOP/s, copy {run.copy:.3g} GB/s")
    _print([line for line in table if line["ms"] is not None])
    print("\n".join(["", *_missing(table)]))
    if result["goals"]:
        print()
        _print(result["goals"])
    text = json.dumps(result)
    if run.json:
        run.json.write_text(text + "\n")
    if run.markdown:
        run.markdown.write_text(markdown(result))
    print(text)
    failed = [line for line in table if line["kernel"].startswith(OURS) and line["note"].startswith(FAILED)]
    if failed:
        raise SystemExit(f"{name}: {len(failed)} lines of our own kernels failed, first: {failed[0]['note']}")


def _versions() -> dict[str, str]:
    """Of what is installed, by distribution: a module may come from several (flash_attn from flash-attn-4 too)."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """A section: the setting, the goals with their verdicts, the table."""
    setting = {key: value for key, value in result.items() if isinstance(value, str | int | float)}
    parts = [f"## {result['benchmark']}", "", ", ".join(f"{key} {_cell(value)}" for key, value in setting.items()), ""]
    if result["mode"] == REHEARSAL:
        parts += ["**A rehearsal on a CPU at small shapes: the times mean nothing.**", ""]
    for table in (result["goals"], [line for line in result["lines"] if line["ms"] is not None]):
        if table:
            columns = _columns(table)
            parts += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            parts += [f"| {' | '.join(_cell(line.get(key)) for key in columns)} |" for line in table]
            parts.append("")
    missing = _missing(result["lines"])
    return "\n".join(parts + [f"* {text}" for text in missing] + ([""] if missing else []))


def _missing(table: Sequence[Line]) -> list[str]:
    """What has no figures and why, each reason once."""
    counts: dict[str, int] = {}
    for line in table:
        if line["ms"] is None:
            text = f"{line['kernel']}, {line['pass']}: {line['note']}"
            counts[text] = counts.get(text, 0) + 1
    return [f"{text} ({count} lines)" for text, count in counts.items()]


def _columns(table: Sequence[Line]) -> list[str]:
    """All columns that have a value somewhere, in the order of their first line."""
    names = dict.fromkeys(key for line in table for key in line)
    return [name for name in names if any(line.get(name) not in (None, "") for line in table)]


def _print(table: Sequence[Line]) -> None:
    if not table:
        return
    columns = _columns(table)
    cells = [columns, *([_cell(line.get(key)) for key in columns] for line in table)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")
