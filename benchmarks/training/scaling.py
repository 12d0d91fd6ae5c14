"""Step time of our trainer against layers, tokens and ranks, with the line that fits best and how far it is off.

    python benchmarks/training/scaling.py --plot scaling.svg     # about 6 minutes on two quiet cores
    python benchmarks/training/scaling.py --quick                # seconds: checks the machinery, not the speed

The Llama of the peer benchmarks (hidden 512, 8 heads, 2 key/value heads, vocabulary 8192), fp32, sequences of 512 read
tokens, packs of 2048; one thread per process, each process on a core of its own. A step is `train_step`: packs,
forward, backward, gradient reduction, clipping, AdamW.

layers, tokens: one process holds all models and takes one step of each in turn, several times; the figure of a point is
the median. The line is the least-squares fit; a point's deviation is (measured - line) / line.
ranks: data parallel over gloo, the same tokens on every rank (weak scaling), so the time of a step should stay that of
one rank. Cores share caches and memory, so it is also compared with as many processes at once that do not speak to
each other: what is left between the two is communication. Only as many ranks as there are cores are measured; nothing
is extrapolated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "peers"))

from common import QUICK_MODEL, ModelSize, save_model
from report import finish, versions
from scaling_processes import Job, Size

from tulu_hpc.telemetry.plots import Series, line_plot

GOAL_PERCENT = 10.0


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Least-squares line y = constant + slope x, and the deviations of the points from it in % of the line."""
    import numpy as np

    slope, constant = np.polyfit(x, y, 1)
    deviations = [100 * (b / (constant + slope * a) - 1) for a, b in zip(x, y, strict=True)]
    return {
        "slope": float(slope),
        "constant": float(constant),
        "deviation_percent": deviations,
        "max_deviation_percent": max(abs(each) for each in deviations),
    }


def measure_curves(curves: dict[str, list[Size]], folder: Path, repeats: int) -> dict[str, Any]:
    """Step times of one process over the sizes of each curve, which differ in the field it is named after."""
    with Job([size for sizes in curves.values() for size in sizes], folder, cores=[0]) as job:
        rounds = [job.steps() for _ in range(repeats + 1)][1:]
    by_size = iter(zip(*rounds, strict=True))
    found = {}
    for name, sizes in curves.items():
        x = [float(getattr(size, name)) for size in sizes]
        repeated = [list(next(by_size)) for _ in sizes]
        seconds = [statistics.median(each) for each in repeated]
        found[name] = {"x": x, "seconds": seconds, "all_seconds": repeated, "fit": fit(x, seconds)}
    return found


def measure_ranks(size: Size, folder: Path, repeats: int, counts: Sequence[int]) -> dict[str, Any]:
    """Weak scaling: a step on n ranks of one job, and on n unconnected processes, in turn."""
    together, apart = [], []
    for count in counts:
        cores = range(count)
        with Job([size], folder, cores) as ranks, Job([size], folder, cores, connected=False) as processes:
            pairs = [(*ranks.steps(), *processes.steps()) for _ in range(repeats + 1)][1:]
        together.append([a for a, _ in pairs])
        apart.append([b for _, b in pairs])
    seconds = [statistics.median(each) for each in together]
    return {
        "x": [float(count) for count in counts],
        "seconds": seconds,
        "unconnected_seconds": [statistics.median(each) for each in apart],
        "all_seconds": together,
        "all_unconnected_seconds": apart,
        "tokens_per_second": [count * size.tokens / each for count, each in zip(counts, seconds)],
        "deviation_percent": [100 * (each / seconds[0] - 1) for each in seconds],
        # Step by step: the two were measured right after each other.
        "communication_percent": [
            100 * (statistics.median(a / b for a, b in zip(*pair, strict=True)) - 1) for pair in zip(together, apart)
        ],
    }


def curve_table(name: str, found: dict[str, Any]) -> list[str]:
    line = found["fit"]
    rows = zip(found["x"], found["seconds"], line["deviation_percent"], strict=True)
    return [
        f"| {name} | step, s | line, s | deviation |",
        "|---:|---:|---:|---:|",
        *(f"| {x:,.0f} | {y:.3f} | {line['constant'] + line['slope'] * x:.3f} | {off:+.1f} % |" for x, y, off in rows),
    ]


def rank_table(found: dict[str, Any]) -> list[str]:
    names = ("x", "seconds", "unconnected_seconds", "tokens_per_second", "deviation_percent", "communication_percent")
    rows = zip(*(found[name] for name in names), strict=True)
    return [
        "| ranks | step, s | unconnected processes, s | tokens/s | against 1 rank | against unconnected |",
        "|---:|---:|---:|---:|---:|---:|",
        *(f"| {n:.0f} | {y:.3f} | {m:.3f} | {t:,.0f} | {one:+.1f} % | {off:+.1f} % |" for n, y, m, t, one, off in rows),
    ]


def verdict(name: str, percent: float) -> dict[str, Any]:
    """`name`: what the step time is compared with; `percent`: the largest deviation from it."""
    met = bool(percent <= GOAL_PERCENT)
    print(f"goal: step time within {GOAL_PERCENT:.0f} % of {name}: {percent:.1f} % {'met' if met else 'MISSED'}")
    return {"what": name, "value": percent, "goal": GOAL_PERCENT, "met": met}


def plot(results: dict[str, Any]) -> str:
    """SVG of everything over the share of the largest size, so that it fits one axis."""
    series = []
    for name in ("layers", "tokens"):
        found = results[name]
        line, largest = found["fit"], max(found["x"])
        share = [each / largest for each in found["x"]]
        series.append(Series(f"{name}, up to {largest:,.0f}", share, found["seconds"], points=True))
        ends = [0.0, 0.5, 1.0]
        height = [line["constant"] + line["slope"] * each * largest for each in ends]
        series.append(Series(f"line over {name}", ends, height))
    ranks = results["ranks"]
    share = [each / max(ranks["x"]) for each in ranks["x"]]
    series.append(Series(f"ranks, up to {max(ranks['x']):.0f}", share, ranks["seconds"], points=True))
    return line_plot("Seconds of a step", series, x_label="share of the largest size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6, 9, 12])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 6144, 8192], help="read per step")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1, 2, 4 ... up to the number of cores")
    parser.add_argument("--tokens-per-rank", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of every point, after one that is not")
    parser.add_argument("--quick", action="store_true", help="tiny model and sizes: checks the machinery")
    parser.add_argument("--json", metavar="PATH", help="also write the last line's JSON object here")
    parser.add_argument("--plot", metavar="PATH", help="write an SVG here")
    args = parser.parse_args()
    model, sequence, step_tokens = ModelSize(), 512, 2048
    if args.quick:
        model, sequence, step_tokens = QUICK_MODEL, 32, 128
        args.layers, args.tokens, args.tokens_per_rank, args.repeats = [1, 2, 3], [64, 128, 256], 128, 2
    for tokens in (*args.tokens, args.tokens_per_rank):
        if tokens % sequence:
            raise SystemExit(f"{tokens} tokens are not whole sequences of {sequence}")
    cores = len(os.sched_getaffinity(0))
    counts = args.ranks or [1 << i for i in range(cores.bit_length())]
    if min(counts) < 1 or max(counts) > cores:
        raise SystemExit(f"--ranks {counts}: every rank gets a core of its own, and there are {cores}")
    depth = model.num_hidden_layers
    with tempfile.TemporaryDirectory(prefix="tulu_hpc_scaling_") as name:
        folder = Path(name)
        for layers in {*args.layers, depth}:
            save_model(folder / str(layers), replace(model, num_hidden_layers=layers), seed=0)
        curves = {
            "layers": [Size(layers, step_tokens, sequence) for layers in args.layers],
            "tokens": [Size(depth, tokens, sequence) for tokens in args.tokens],
        }
        results = measure_curves(curves, folder, args.repeats)
        results["ranks"] = measure_ranks(Size(depth, args.tokens_per_rank, sequence), folder, args.repeats, counts)
    tables = {
        f"layers ({step_tokens:,} tokens)": curve_table("layers", results["layers"]),
        f"tokens ({depth} layers)": curve_table("tokens read", results["tokens"]),
        f"ranks ({depth} layers, {args.tokens_per_rank:,} tokens on each)": rank_table(results["ranks"]),
    }
    for title, lines in tables.items():
        print(f"Step time against {title}\n", *lines, "", sep="\n")
    goals = [verdict(f"the line over {name}", results[name]["fit"]["max_deviation_percent"]) for name in curves]
    for name, key in (("that of one rank", "deviation_percent"), ("unconnected processes", "communication_percent")):
        goals.append(verdict(name, max(abs(each) for each in results["ranks"][key])))
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        Path(args.plot).write_text(plot(results) + "\n")
    finish(
        {
            "benchmark": "scaling",
            **results,
            "goals": goals,
            "repeats": args.repeats,
            "quick": args.quick,
            "cores": cores,
            "load_average": os.getloadavg(),
            "versions": versions(),
        },
        args.json,
    )


if __name__ == "__main__":
    main()
