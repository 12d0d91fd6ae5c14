"""Command line and run of a peer benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Lengths, ModelSize, Spec, random_rows, save_model
from report import (
    Setting,
    compare,
    describe,
    finish,
    goals,
    print_comparison,
    print_goals,
    print_parts,
    summary,
    versions,
)
from turns import Turn, Worker, run_worker, take_turns

PACK_ROWS = 1024


@dataclass(frozen=True)
class Case:
    """A distribution of lengths and the model to train. `default` False: it runs only if asked for by --case."""

    name: str
    lengths: dict[str, Lengths]
    model: ModelSize
    default: bool = True


@dataclass(frozen=True)
class Contest:
    """A kind of training in which two trainers compete.

    Attributes:
        name: `sft`, `dpo`.
        rate, unit: what the goal is about, and what a step's rows are called.
        goal_ratio: our rate over theirs, at least.
        workers: `ours` and `theirs`.
        settings: the peer's. default_settings: names of those that run unasked; the first is the peer's own default.
        parts: our trainer without one of its parts each.
        cases: by --quick.
    """

    name: str
    rate: str
    unit: str
    goal_ratio: float
    workers: dict[str, Callable[[Spec, Turn], None]]
    settings: Sequence[Setting]
    default_settings: Sequence[str]
    parts: Sequence[Setting]
    cases: dict[bool, list[Case]]
    global_batch: int
    steps: int


def run_benchmark(contest: Contest, description: str, script: Path) -> None:
    """Entry of a peer benchmark: the driver, or (with --worker) one of its processes."""
    args = _arguments(contest, description).parse_args()
    if args.worker:
        run_worker(contest.workers, args.worker, args.spec)
        return
    known = contest.cases[args.quick]
    wanted = [case for case in known if (args.case is None and case.default) or args.case == case.name]
    if not wanted:
        raise SystemExit(f"no case {args.case!r}; there are: {', '.join(case.name for case in known)}")
    print(
        f"{contest.name}: {args.steps} timed steps of {contest.global_batch} {contest.unit} after {args.warmup}, "
        f"{args.threads} thread(s)"
    )
    results = {}
    for case in wanted:
        keep = args.directory and f"{args.directory}/{contest.name}-{case.name.replace(' ', '-')}"
        with workplace(keep) as directory:
            results[case.name] = _run_case(contest, case, script, directory, args)
    finish(
        {
            "benchmark": f"trl_{contest.name}",
            "ratio": {case: found["ratio"] for case, found in results.items()},
            "ratio_fastest": {case: found["ratio_fastest"] for case, found in results.items()},
            "parts": {case: found["parts_ratio"] for case, found in results.items()},
            "goals": {case: found["goals"] for case, found in results.items()},
            "cases": results,
            "versions": versions(),
            "threads": args.threads,
            "quick": args.quick,
            "load_average": os.getloadavg(),
        },
        args.json,
    )


def _arguments(contest: Contest, description: str) -> argparse.ArgumentParser:
    known = "\n".join(f"  {each.name}: {each.meaning}" for each in contest.settings)
    known += "\nparts:\n" + "\n".join(f"  {each.name}: {each.meaning}" for each in contest.parts)
    parser = argparse.ArgumentParser(
        description=description, epilog=f"settings:\n{known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings, parts = [s.name for s in contest.settings], [s.name for s in contest.parts]
    parser.add_argument("--steps", type=int, default=contest.steps, help="timed optimizer steps per contestant")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each process")
    parser.add_argument("--settings", nargs="+", default=contest.default_settings, choices=settings)
    parser.add_argument(
        "--without", nargs="*", default=parts, choices=parts, help="parts of ours to take away in turn (default: all)"
    )
    parser.add_argument(
        "--pack-rows", type=int, default=PACK_ROWS, help="rows of a pack; at least those of the longest item"
    )
    parser.add_argument("--case", help="only this case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny model and data: checks the machinery, not the speed")
    parser.add_argument("--json", metavar="PATH", help="also write the last line's JSON object here")
    parser.add_argument("--directory", help="keep models, data and logs here (default: temporary)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    return parser


def _run_case(contest: Contest, case: Case, script: Path, directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    parameters = save_model(directory / "model", case.model, args.seed)
    steps = args.warmup + args.steps
    rows = random_rows(case.lengths, steps * contest.global_batch, case.model.vocab_size, args.seed + 1)
    (directory / "rows.json").write_text(json.dumps(rows))
    longest = max(sum(len(part) for part in row.values()) for row in rows)

    def contestant(label: str, worker: str, options: dict[str, Any]) -> Worker:
        spec = Spec(
            model_dir=str(directory / "model"),
            output_dir=str(directory / label),
            rows_file=str(directory / "rows.json"),
            steps=steps,
            global_batch=options.get("accumulate", contest.global_batch),
            threads=args.threads,
            lr=2e-5,
            pack_rows=max(args.pack_rows, longest),
            options=options,
        )
        return Worker(label, script, worker, spec, directory)

    settings = [setting for setting in contest.settings if setting.name in args.settings]
    parts = [part for part in contest.parts if part.name in args.without]
    print(f"\n{case.name}: {parameters / 1e6:.1f}M parameters; {describe(rows)}", flush=True)
    ours, *others = take_turns(
        [contestant("ours", "ours", {})]
        + [contestant(setting.name, "theirs", setting.options) for setting in settings]
        + [contestant(f"ours without {part.name}", "ours", part.options) for part in parts],
        steps,
    )
    figures = [
        compare(ours, other, setting, args.warmup, contest.global_batch)
        for other, setting in zip(others, [*settings, *parts], strict=True)
    ]
    compared, taken = figures[: len(settings)], figures[len(settings) :]
    mine = summary(ours, args.warmup, contest.global_batch)
    print_comparison(mine, compared, contest.unit)
    if taken:
        print()
        print_parts(taken, compared)
    first, fastest = compared[0], min(compared, key=lambda each: each["ratio"])
    print(f"\nratio {first['ratio']:.2f}: ours over {first['setting']}")
    print(
        f"ratio_fastest {fastest['ratio']:.2f}: ours over {fastest['setting']}, the fastest setting of TRL in this run"
    )
    verdicts = goals(compared, contest.goal_ratio, contest.rate)
    print_goals(verdicts)
    return {
        "ratio": first["ratio"],
        "ratio_fastest": fastest["ratio"],
        "fastest_setting": fastest["setting"],
        "ratio_by_setting": {each["setting"]: each["ratio"] for each in compared},
        "memory_ratio_by_setting": {each["setting"]: each["memory_ratio"] for each in compared},
        "parts_ratio": {each["setting"]: each["ratio"] for each in taken},
        "goals": verdicts,
        "parameters": parameters,
        "data": describe(rows),
        "ours": mine,
        "theirs": {each["setting"]: each for each in compared},
        "without": {each["setting"]: each for each in taken},
    }


@contextlib.contextmanager
def workplace(keep: str | None) -> Iterator[Path]:
    """A temporary directory, or `keep`, which stays."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="tulu_hpc_peers_") as directory:
            yield Path(directory)
    else:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)
