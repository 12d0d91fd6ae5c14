"""Plots and HTML pieces: well-formed, self-contained, escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from tulu_hpc.telemetry.html import Html, details, page, table, tag, text
from tulu_hpc.telemetry.plots import Bar, Series, bar_plot, line_plot


def test_line_plot_is_svg_with_text_and_page_colours() -> None:
    svg = line_plot(
        "Loss <1>", [Series("a", range(2000), [1 / (i + 1) for i in range(2000)]), Series("b", [1, 2], [3, 4])]
    )
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("aria-label") == "Loss <1>"
    assert "currentColor" in svg and "<text" in svg and "http://www.w3.org/1999/02/22-rdf" not in svg
    assert len(svg) < 60_000  # 2000 points are drawn as stretches


def test_two_plots_share_no_ids() -> None:
    def ids(svg: str) -> set[str]:
        return {element.get("id") or "" for element in ElementTree.fromstring(svg).iter()} - {""}

    first, second = (line_plot(title, [Series("a", [1, 2], [1, 2])]) for title in ("one", "two"))
    assert ids(first) and not ids(first) & ids(second)
    for svg in (first, second):
        assert all(f'"{name}"' in svg for name in ids(svg))


def test_points_are_dots_without_a_line() -> None:
    line, dots = (line_plot("x", [Series("a", [1, 2, 3], [1, 2, 4], points=points)]) for points in (False, True))
    # A dot is drawn by reference to one shape; the line's own stroke has the first colour and its width.
    assert line.count("<use") < dots.count("<use")
    assert "stroke-width: 1.6" in line and "stroke-width: 1.6" not in dots


def test_values_that_are_not_finite_are_left_out() -> None:
    assert line_plot("x", [Series("a", [1, 2, 3], [1.0, math.nan, math.inf])])
    with pytest.raises(ValueError, match="no finite values"):
        line_plot("x", [Series("a", [1], [math.nan])])


def test_bar_plot_needs_a_bar_per_group() -> None:
    bar = Bar(50, 45, 55)
    assert "currentColor" in bar_plot("s", ["a", "b"], {"SFT": [bar, bar], "DPO": [bar, bar]}, y_label="%", top=100)
    with pytest.raises(ValueError, match="1 bars for 2 groups"):
        bar_plot("s", ["a", "b"], {"SFT": [bar]}, y_label="%", top=100)


def test_text_is_escaped_and_markup_is_kept() -> None:
    evil = "<script>alert('x')</script>"
    made = page(evil, tag("p", evil, title=evil) + details(evil, evil) + table([evil], [[evil]], caption=evil))
    assert "<script" not in page(evil, Html(tag("p", evil, title=evil)))
    assert text(Html("<b>")) == "<b>" and text("<b>") == "&lt;b&gt;"
    assert "http" not in made
