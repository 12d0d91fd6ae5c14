"""What reinforcement learning selects and what it teaches, computed from answers with and without shown working.

Accuracy is p s + (1 - p) d: p the share of answers that show a calculation, s and d the accuracies of answers with and
without one. From the first to the last stage, moving p alone (s and d as before) is a change of habit: answers that the
model gave already, chosen more often. The rest is better work within each kind of answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tulu_hpc.telemetry.html import Html, paragraph, section, table
from tulu_hpc.telemetry.results import TaskScores, Working


@dataclass(frozen=True)
class Split:
    """Gain in accuracy from one stage to another, in two parts."""

    gain: float
    selected: float
    taught: float


def split_gain(before: Working, after: Working) -> Split | None:
    """The parts of the gain; None where `before` has no answers of one kind, so that its accuracy is unknown."""
    if before.accuracy_shown is None or before.accuracy_direct is None:
        return None
    moved = after.share * before.accuracy_shown + (1 - after.share) * before.accuracy_direct
    return Split(after.accuracy - before.accuracy, moved - before.accuracy, after.accuracy - moved)


def working_section(scores: Mapping[str, Sequence[TaskScores]]) -> Html:
    """Table and paragraph for every task that counts shown working; nothing when there is none."""
    parts: list[Html] = []
    stages = list(scores)
    for task in scores[stages[0]]:
        found = {stage: next(each for each in scores[stage] if each.name == task.name) for stage in stages}
        figures = {stage: each.working for stage, each in found.items() if each.working is not None}
        if len(figures) < len(stages):
            continue
        rows = [
            [
                stage,
                str(found[stage].items * found[stage].draws),
                f"{100 * figure.share:.0f} %",
                _percent(figure.accuracy_shown),
                _percent(figure.accuracy_direct),
                f"{100 * figure.accuracy:.1f} %",
            ]
            for stage, figure in figures.items()
        ]
        headers = ["stage", "sampled answers", "show working", "correct when shown", "correct when not", "correct"]
        parts.append(table(headers, rows, caption=task.name))
        parts.append(paragraph(_explain(task.name, stages[0], stages[-1], figures[stages[0]], figures[stages[-1]])))
    if not parts:
        return Html("")
    note = (
        "The demonstrations contain two kinds of answers on purpose: some show their working, some only the result. "
        "The table tells whether a later stage chooses the better kind more often or gets better at it."
    )
    return section("working", "What is selected and what is taught", paragraph(note), *parts)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.0f} %"


def _explain(task: str, first: str, last: str, before: Working, after: Working) -> str:
    split = split_gain(before, after)
    if split is None:
        return f"{task}: {first} gives only one kind of answer, so its gain cannot be split."
    moved = 100 * (before.accuracy + split.selected)
    text = (
        f"{task}: from {first} to {last} accuracy moves by {100 * split.gain:+.1f} points. A model with the accuracies "
        f"of {first} in each kind of answer and the habits of {last} would score {moved:.0f} %: "
        f"{100 * split.selected:+.1f} points come from how often working is shown, "
        f"{100 * split.taught:+.1f} points from better answers of either kind."
    )
    if split.gain <= 0:
        return f"{text} There is no gain to explain."
    if split.selected >= split.gain / 2:
        return f"{text} Most of the gain is a behaviour that the demonstrations contained and that training selects."
    return f"{text} Most of the gain is better work, not a change of habit."
