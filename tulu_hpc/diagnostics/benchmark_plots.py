"""Plots of the kernel benchmarks: the share of the roofline of every contestant that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tulu_hpc.telemetry.plots import Bar, bar_plot

# What tells two shapes of a family apart, in the order of a label.
_COLUMNS = ("part", "shape", "kind", "valid", "layout")
_SHAPES = 3  # in one plot: more names do not fit beside each other above it


def plots(family: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """SVG by file name: up to three shapes in one plot, each in its last pass (with gradients, where it has one)."""
    measured = [line for line in lines if line["roofline"] is not None and line["extra_MiB"] is not None]
    last = {label(line): line["pass"] for line in measured}
    shapes: dict[str, dict[str, float]] = {}
    for line in measured:
        if line["pass"] == last[label(line)]:
            shapes.setdefault(label(line), {})[line["kernel"]] = line["roofline"]
    names = list(shapes)
    found = {}
    for start in range(0, len(names), _SHAPES):
        chosen = {name: shapes[name] for name in names[start : start + _SHAPES]}
        contestants = list(dict.fromkeys(kernel for values in chosen.values() for kernel in values))
        bars = {name: [_bar(values.get(kernel)) for kernel in contestants] for name, values in chosen.items()}
        top = 1.1 * max(value for values in chosen.values() for value in values.values())
        found[f"{family}_{start // _SHAPES + 1}.svg"] = bar_plot(
            f"{family}: {', '.join(chosen)}",
            [kernel.replace(" ", "\n").replace("-", "-\n", 1) for kernel in contestants],
            bars,
            y_label="share of the roofline",
            top=top,
        )
    return found


def label(line: Mapping[str, Any]) -> str:
    """The shape of a line in words."""
    parts = [f"valid {line[name]:g}" if name == "valid" else str(line[name]) for name in _COLUMNS if line.get(name)]
    return " ".join(parts)


def _bar(value: float | None) -> Bar:
    known = math.nan if value is None else value
    return Bar(known, known, known)
