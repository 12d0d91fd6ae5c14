"""Figures of a peer benchmark: each contestant's own, ours against each other's, parts taken away, goals."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from turns import Outcome

MIB = 1 << 20
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "megatron-core", "tulu_hpc", "numpy")
# Losses of two contestants on the same batches may differ by this, relatively: rounding in fp32, grown over some steps.
LOSS_TOLERANCE = 1e-4
LOGPROB_TOLERANCE = 1e-4  # of the mean over a batch's trained tokens, where contestants report it
GOAL_MEMORY = 0.6


@dataclass(frozen=True)
class Setting:
    """One way to run a contestant. `same_batches` False: it makes its own batches, so only rates can be compared."""

    name: str
    options: dict[str, Any]
    meaning: str
    same_batches: bool = True


def describe(rows: Sequence[dict[str, list[int]]]) -> str:
    """Lengths of the data in words."""
    parts = []
    for name in rows[0]:
        counts = [len(row[name]) for row in rows]
        parts.append(f"{name} {min(counts)}..{max(counts)} mean {statistics.mean(counts):.0f}")
    return f"{len(rows)} rows, tokens: {', '.join(parts)}"


def summary(outcome: Outcome, warmup: int, batch: int) -> dict[str, Any]:
    """Medians of one contestant over the timed steps, and its losses of all steps; `batch`: rows or pairs of a step."""
    timed = outcome.steps[warmup:]
    return {
        "tokens_per_second": statistics.median(s["tokens"] / s["seconds"] for s in timed),
        "tokens_per_cpu_second": statistics.median(s["tokens"] / s["cpu_seconds"] for s in timed),
        "items_per_second": statistics.median(batch / s["seconds"] for s in timed),
        "rows_per_step": statistics.mean(s["rows"] for s in timed),
        "seconds": [s["seconds"] for s in timed],
        "cpu_seconds": [s["cpu_seconds"] for s in timed],
        "losses": outcome.series("loss"),
        "peak_rss_mib": outcome.peak_rss / MIB,
        "setup": outcome.setup,
    }


def compare(ours: Outcome, other: Outcome, setting: Setting, warmup: int, batch: int) -> dict[str, Any]:
    """The other's summary, and ours against it: the median over the timed steps of each step's own ratio of times
    (theirs over ours), and our peak memory over theirs.

    Raises:
        RuntimeError: the two did not train the same tokens, or their losses differ.
    """
    found = {"setting": setting.name, **summary(other, warmup, batch)}
    mine = summary(ours, warmup, batch)
    found["memory_ratio"] = mine["peak_rss_mib"] / found["peak_rss_mib"]
    if not setting.same_batches:
        found["ratio"] = mine["tokens_per_second"] / found["tokens_per_second"]
        found["cpu_ratio"] = mine["tokens_per_cpu_second"] / found["tokens_per_cpu_second"]
        return found
    if ours.series("tokens") != other.series("tokens"):
        raise RuntimeError(
            f"tokens per step differ: ours {ours.series('tokens')}, {setting.name} {other.series('tokens')}"
        )
    losses, others = ours.series("loss"), other.series("loss")
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses, others, strict=True)]
    if not all(each <= LOSS_TOLERANCE for each in differences):  # also where one is NaN
        shown = ", ".join(f"{each:.1e}" for each in differences)
        raise RuntimeError(f"losses differ by {shown}: ours {losses}, {setting.name} {others}")
    if "logprob" in ours.steps[0] and not all(
        abs(a - b) <= LOGPROB_TOLERANCE for a, b in zip(ours.series("logprob"), other.series("logprob"), strict=True)
    ):
        raise RuntimeError(
            f"mean log-probs differ: ours {ours.series('logprob')}, {setting.name} {other.series('logprob')}"
        )
    timed = list(zip(ours.steps, other.steps, strict=True))[warmup:]
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in timed)
    return found | {
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "cpu_ratio": statistics.median(b["cpu_seconds"] / a["cpu_seconds"] for a, b in timed),
        "loss_difference": max(differences),
    }


def print_comparison(mine: dict[str, Any], compared: Sequence[dict[str, Any]], unit: str) -> None:
    """`unit`: what a step's rows are called."""
    print_table(
        ["", "trained tok/s", f"{unit}/s", "tokens read/step", "peak MiB", "ratio", "range", "by CPU time"]
        + ["memory, ours/it", "loss difference"],
        [["ours", *_own(mine)] + [""] * 5] + [[each["setting"], *_own(each), *_against(each)] for each in compared],
    )


def _own(each: dict[str, Any]) -> list[Any]:
    names = ("tokens_per_second", "items_per_second", "rows_per_step", "peak_rss_mib")
    return [float(each[name]) for name in names]


def _against(each: dict[str, Any]) -> list[Any]:
    low_high, difference = each.get("ratio_range"), each.get("loss_difference")
    return [
        each["ratio"],
        f"{low_high[0]:.2f}..{low_high[1]:.2f}" if low_high else "",
        each["cpu_ratio"],
        each["memory_ratio"],
        "other batches" if difference is None else f"{difference:.1e}",
    ]


def print_parts(parts: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]]) -> None:
    """What each part gains: step time and peak memory of our trainer without it, over those of our trainer."""
    print_table(
        ["ours without", "time", "range", "by CPU time", "peak memory"],
        [[each["setting"], *_against(each)[:3], 1 / each["memory_ratio"]] for each in parts]
        + [[f"({each['setting']})", *_against(each)[:3], 1 / each["memory_ratio"]] for each in compared],
    )


def goals(compared: Sequence[dict[str, Any]], goal_ratio: float, rate: str) -> list[dict[str, Any]]:
    """Every goal against every setting of the peer, with its verdict."""
    found = []
    for each in compared:
        value, memory = each["ratio"], each["memory_ratio"]
        against = each["setting"]
        found.append({"what": rate, "against": against, "value": value, "goal": goal_ratio, "met": value >= goal_ratio})
        found.append(
            {
                "what": "peak memory",
                "against": against,
                "value": memory,
                "goal": GOAL_MEMORY,
                "met": memory <= GOAL_MEMORY,
            }
        )
    return found


def print_goals(found: Sequence[dict[str, Any]]) -> None:
    for each in found:
        sign = "<=" if each["what"] == "peak memory" else ">="
        verdict = "met" if each["met"] else "MISSED"
        print(f"goal: {each['what']} {sign} {each['goal']} x {each['against']}: {each['value']:.2f} {verdict}")


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
