"""Command line, run and report of a peer benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import Lengths, ModelSize, Spec, random_rows, save_model
from turns import Outcome, Turn, Worker, run_worker, take_turns

MIB = 1 << 20
PACK_ROWS = 4096
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "megatron-core", "tulu_hpc", "numpy")


@dataclass(frozen=True)
class Setting:
    """One way to run the peer. `same_batches` False: it makes its own batches, so only rates can be compared."""

    name: str
    options: dict[str, Any]
    meaning: str
    same_batches: bool = True


@dataclass(frozen=True)
class Case:
    """A distribution of lengths and the model to train."""

    name: str
    lengths: dict[str, Lengths]
    model: ModelSize


Workers = dict[str, Callable[[Spec, Turn], None]]


def run_benchmark(
    description: str,
    name: str,
    script: Path,
    *,
    workers: Workers,
    settings: Sequence[Setting],
    default_settings: Sequence[str],
    cases: dict[bool, list[Case]],
    global_batch: int,
) -> None:
    """Entry of a peer benchmark: the driver, or (with --worker) one of its processes.

    Args:
        workers: `ours` and `theirs`.
        cases: by --quick.
    """
    args = _arguments(description, settings, default_settings).parse_args()
    if args.worker:
        run_worker(workers, args.worker, args.spec)
        return
    chosen = [setting for setting in settings if setting.name in args.settings]
    print(f"{name}: {args.steps} timed steps of {global_batch} rows after {args.warmup}, {args.threads} thread(s)")
    results = {}
    for case in cases[args.quick]:
        if args.case in (None, case.name):
            with workplace(args.directory and f"{args.directory}/{name}-{case.name.replace(' ', '-')}") as directory:
                results[case.name] = _run_case(case, chosen, script, directory, global_batch, args)
    if not results:
        raise SystemExit(f"no case {args.case!r}; there are: {', '.join(case.name for case in cases[args.quick])}")
    ratio = {case: found["ratio"] for case, found in results.items()}
    finish(
        {
            "benchmark": f"trl_{name}",
            "ratio": ratio,
            "ratio_fastest": {case: found["ratio_fastest"] for case, found in results.items()},
            "cases": results,
            "versions": versions(),
            "threads": args.threads,
            "quick": args.quick,
            "load_average": os.getloadavg(),
        },
        args.json,
    )


def _arguments(
    description: str, settings: Sequence[Setting], default_settings: Sequence[str]
) -> argparse.ArgumentParser:
    known = "\n".join(f"  {each.name}: {each.meaning}" for each in settings)
    parser = argparse.ArgumentParser(
        description=description, epilog=f"settings:\n{known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps per contestant")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each process")
    parser.add_argument("--settings", nargs="+", default=default_settings, choices=[s.name for s in settings])
    parser.add_argument("--case", help="only this case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny model and data: checks the machinery, not the speed")
    parser.add_argument("--json", metavar="PATH", help="also write the last line's JSON object here")
    parser.add_argument("--directory", help="keep models, data and logs here (default: temporary)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    return parser


def _run_case(
    case: Case, settings: Sequence[Setting], script: Path, directory: Path, global_batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    parameters = save_model(directory / "model", case.model, args.seed)
    steps = args.warmup + args.steps
    rows = random_rows(case.lengths, steps * global_batch, case.model.vocab_size, args.seed + 1)
    (directory / "rows.json").write_text(json.dumps(rows))

    def contestant(label: str, worker: str, options: dict[str, Any]) -> Worker:
        spec = Spec(
            model_dir=str(directory / "model"),
            output_dir=str(directory / label),
            rows_file=str(directory / "rows.json"),
            steps=steps,
            global_batch=options.get("accumulate", global_batch),
            threads=args.threads,
            lr=2e-5,
            pack_rows=PACK_ROWS,
            options=options,
        )
        return Worker(label, script, worker, spec, directory)

    print(f"\n{case.name}: {parameters / 1e6:.1f}M parameters; {describe(rows)}", flush=True)
    contestants = [contestant("ours", "ours", {})] + [contestant(s.name, "theirs", s.options) for s in settings]
    ours, *others = take_turns(contestants, steps)
    compared = [compare(ours, other, s, args.warmup) for other, s in zip(others, settings, strict=True)]
    print_comparison(ours, compared, args.warmup)
    first, fastest = compared[0], min(compared, key=lambda each: each["ratio"])
    print(f"ratio {first['ratio']:.2f}: ours over {first['setting']}")
    print(
        f"ratio_fastest {fastest['ratio']:.2f}: ours over {fastest['setting']}, the fastest setting of TRL in this run"
    )
    return {
        "ratio": first["ratio"],
        "ratio_fastest": fastest["ratio"],
        "fastest_setting": fastest["setting"],
        "ratio_by_setting": {each["setting"]: each["ratio"] for each in compared},
        "parameters": parameters,
        "data": describe(rows),
        "ours": summary(ours, args.warmup),
        "theirs": {each["setting"]: each for each in compared},
    }


def describe(rows: Sequence[dict[str, list[int]]]) -> str:
    """Lengths of the data in words."""
    parts = []
    for name in rows[0]:
        counts = [len(row[name]) for row in rows]
        parts.append(f"{name} {min(counts)}..{max(counts)} mean {statistics.mean(counts):.0f}")
    return f"{len(rows)} rows, tokens: {', '.join(parts)}"


def summary(outcome: Outcome, warmup: int) -> dict[str, Any]:
    """Medians of one contestant over the timed steps, and its losses of all steps."""
    timed = outcome.steps[warmup:]
    return {
        "tokens_per_second": statistics.median(s["tokens"] / s["seconds"] for s in timed),
        "tokens_per_cpu_second": statistics.median(s["tokens"] / s["cpu_seconds"] for s in timed),
        "rows_per_step": statistics.mean(s["rows"] for s in timed),
        "seconds": [s["seconds"] for s in timed],
        "losses": outcome.series("loss"),
        "peak_rss_mib": outcome.peak_rss / MIB,
        "setup": outcome.setup,
    }


def compare(ours: Outcome, theirs: Outcome, setting: Setting, warmup: int) -> dict[str, Any]:
    """Their summary, and our rate over theirs: the median over the timed steps of each step's own ratio.

    Raises:
        RuntimeError: the two sides did not train the same tokens.
    """
    found = {"setting": setting.name, **summary(theirs, warmup)}
    mine = summary(ours, warmup)
    if not setting.same_batches:
        found["ratio"] = mine["tokens_per_second"] / found["tokens_per_second"]
        found["cpu_ratio"] = mine["tokens_per_cpu_second"] / found["tokens_per_cpu_second"]
        return found
    if ours.series("tokens") != theirs.series("tokens"):
        raise RuntimeError(f"tokens per step differ: {ours.series('tokens')} and {theirs.series('tokens')}")
    timed = list(zip(ours.steps, theirs.steps, strict=True))[warmup:]
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in timed)
    losses = list(zip(ours.series("loss"), theirs.series("loss"), strict=True))
    return found | {
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "cpu_ratio": statistics.median(b["cpu_seconds"] / a["cpu_seconds"] for a, b in timed),
        "loss_difference": max(abs(a - b) / max(abs(b), 1e-12) for a, b in losses),
    }


def print_comparison(ours: Outcome, compared: Sequence[dict[str, Any]], warmup: int) -> None:
    columns = ["", "trained tok/s", "rows/step", "peak MiB", "ratio", "range", "by CPU time", "loss difference"]
    mine = summary(ours, warmup)
    rows: list[list[Any]] = [
        ["ours", mine["tokens_per_second"], mine["rows_per_step"], mine["peak_rss_mib"]] + [""] * 4
    ]
    for each in compared:
        low_high = each.get("ratio_range")
        difference = each.get("loss_difference")
        rows.append(
            [each["setting"], each["tokens_per_second"], each["rows_per_step"], each["peak_rss_mib"], each["ratio"]]
            + [f"{low_high[0]:.2f}..{low_high[1]:.2f}" if low_high else "", each["cpu_ratio"]]
            + ["other batches" if difference is None else f"{difference:.1e}"]
        )
    print_table(columns, rows)


def finish(result: dict[str, Any], path: str | None) -> None:
    """Print the result as the last line, one JSON object; write it to `path` if given."""
    line = json.dumps(result)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(line + "\n")
    print(line)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [list(columns)] + [[f"{c:,.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for index, row in enumerate(cells):
        print("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))))
        if index == 0:
            print("  ".join("-" * w for w in widths))


@contextlib.contextmanager
def workplace(keep: str | None) -> Iterator[Path]:
    """A temporary directory, or `keep`, which stays."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="tulu_hpc_peers_") as directory:
            yield Path(directory)
    else:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)
