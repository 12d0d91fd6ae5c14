"""Plots as inline SVG: no files, no scripts, colours that follow the page (light or dark).

matplotlib's SVG canvas is used without pyplot: no display is needed and no global state of figures is kept.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_INK = "#0a0b0c"  # replaced by the page's text colour
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#b05cc9", "#c9485b", "#7a8b99")
_POINTS = 300


@dataclass(frozen=True)
class Series:
    """A curve: `x` and `y` of one length; values that are not finite are left out. `points`: dots without a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with its interval; all in the unit of the axis."""

    value: float
    low: float
    high: float


def line_plot(title: str, series: Sequence[Series], *, x_label: str = "step", log_y: bool = False) -> str:
    """Curves over steps: the mean of each stretch as a line, its smallest and largest value as a band.

    Raises:
        ValueError: no curve has a finite value.
    """
    figure, axes = _figure(width=5.2, height=2.7)
    drawn = 0
    for number, curve in enumerate(series):
        x, mean, low, high = _stretches(curve)
        if not x:
            continue
        drawn += 1
        colour = COLOURS[number % len(COLOURS)]
        marker = "o" if curve.points or len(x) < 3 else None
        width = 0 if curve.points else 1.6
        axes.plot(x, mean, color=colour, linewidth=width, label=curve.name, marker=marker, markersize=3)
        if len(x) < len(curve.x):
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    if not drawn:
        raise ValueError(f"plot {title!r}: no finite values")
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, axes, title)


def bar_plot(title: str, groups: Sequence[str], bars: Mapping[str, Sequence[Bar]], *, y_label: str, top: float) -> str:
    """Groups of bars with intervals; `bars[series][group]`.

    Raises:
        ValueError: a series has another number of bars than there are groups.
    """
    figure, axes = _figure(width=7.2, height=3.0)
    width = 0.8 / max(1, len(bars))
    for number, (name, values) in enumerate(bars.items()):
        if len(values) != len(groups):
            raise ValueError(f"plot {title!r}: {name} has {len(values)} bars for {len(groups)} groups")
        x = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        below = [max(0.0, bar.value - bar.low) for bar in values]
        above = [max(0.0, bar.high - bar.value) for bar in values]
        axes.bar(x, [bar.value for bar in values], width * 0.92, color=COLOURS[number % len(COLOURS)], label=name)
        axes.errorbar(
            x, [bar.value for bar in values], yerr=[below, above], fmt="none", ecolor=_INK, elinewidth=1, capsize=2
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, top)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, labelcolor=_INK, ncols=len(bars), loc="lower left", bbox_to_anchor=(0, 1.0))
    return _svg(figure, axes, title, show_title=False)


def _figure(*, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text: readable by screen readers, in the page's font, and a fifth of the bytes.
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"})
    figure = Figure(figsize=(width, height))
    # Margins in inches, fixed: letting matplotlib fit them doubles the time of a plot.
    axes = figure.add_axes((0.62 / width, 0.45 / height, 1 - 0.75 / width, 1 - 0.78 / height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, axes: Any, title: str, *, show_title: bool = True) -> str:
    import matplotlib

    if show_title:
        axes.set_title(title, color=_INK, loc="left", fontsize=10)
    buffer = io.StringIO()
    # Element ids are salted per plot: several plots in one page must not share clip paths.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A style element would apply to the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor")
    prefix = hashlib.sha256(title.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    label = f'<svg role="img" aria-label="{escape(title)}" style="stroke-linejoin: round; stroke-linecap: butt" '
    return text.replace("<svg ", label, 1).strip()


def _stretches(curve: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, mean, smallest, largest of at most `_POINTS` equal stretches of the finite points."""
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    size = max(1, math.ceil(len(points) / _POINTS))
    xs, means, lows, highs = [], [], [], []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ys = [y for _, y in part]
        xs.append(sum(x for x, _ in part) / len(part))
        means.append(sum(ys) / len(ys))
        lows.append(min(ys))
        highs.append(max(ys))
    return xs, means, lows, highs
