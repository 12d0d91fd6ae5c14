"""Plots of the kernel benchmarks: the share of the roofline of every contestant that was measured."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tulu_hpc.telemetry.plots import Bar, bar_plot

# What tells two shapes of a family apart, in the order of a label.
_COLUMNS = ("part", "shape", "kind", "valid", "layout")
_LEGEND = 62  # characters beside each other above a plot


def plots(family: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """SVG by file name: some shapes in one plot, each in its last pass (with gradients, where it has one)."""
    measured = [line for line in lines if line["roofline"] is not None and line["extra_MiB"] is not None]
    last = {label(line): line["pass"] for line in measured}
    shapes: dict[str, dict[str, float]] = {}
    for line in measured:
        if line["pass"] == last[label(line)]:
            shapes.setdefault(label(line), {})[line["kernel"]] = line["roofline"]
    found: dict[str, str] = {}
    for chosen in _fitting(list(shapes)):
        contestants = list(dict.fromkeys(kernel for name in chosen for kernel in shapes[name]))
        bars = {name: [_bar(shapes[name].get(kernel)) for kernel in contestants] for name in chosen}
        found[f"{family}_{len(found) + 1}.svg"] = bar_plot(
            f"{family}: {', '.join(chosen)}",
            [textwrap.fill(kernel, 11) for kernel in contestants],
            bars,
            y_label="share of the roofline",
            top=1.1 * max(value for name in chosen for value in shapes[name].values()),
        )
    return found


def _fitting(names: Sequence[str]) -> list[list[str]]:
    """Names in their order, in parts of up to three that fit beside each other."""
    parts: list[list[str]] = []
    for name in names:
        if parts and len(parts[-1]) < 3 and len("".join(parts[-1])) + len(name) <= _LEGEND:
            parts[-1].append(name)
        else:
            parts.append([name])
    return parts


def label(line: Mapping[str, Any]) -> str:
    """The shape of a line in words."""
    parts = [f"valid {line[name]:g}" if name == "valid" else str(line[name]) for name in _COLUMNS if line.get(name)]
    return " ".join(part for part in parts if part != "attention")


def _bar(value: float | None) -> Bar:
    known = math.nan if value is None else value
    return Bar(known, known, known)
