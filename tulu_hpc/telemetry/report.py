"""`report.html`: what a recipe did, in one file without outside resources.

Everything is computed from files that the steps left; a file that should be there and is not is an error, never a gap.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tulu_hpc.telemetry.files import write_atomically
from tulu_hpc.telemetry.html import Html, details, join, page, paragraph, pre, section, table, tag
from tulu_hpc.telemetry.metrics import TelemetryError, read_metrics
from tulu_hpc.telemetry.plots import Bar, Series, bar_plot, line_plot
from tulu_hpc.telemetry.progress import duration
from tulu_hpc.telemetry.report_data import data_sections
from tulu_hpc.telemetry.results import Interval, TaskScores, load_evaluation
from tulu_hpc.telemetry.step_clock import PHASES
from tulu_hpc.telemetry.working import working_section

_SAMPLES_PER_TASK = 3
_BEFORE = "before training"
_PACKAGES = ("tulu_hpc", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "pydantic", "triton")

# Panels of a run, in order: title, metrics (patterns; those that are there are drawn), logarithmic axis.
_PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Loss", ("train/loss",), False),
    ("Reward", ("rollout/reward",), False),
    ("Share of correct answers", ("rollout/accuracy*",), False),
    ("KL to the reference", ("train/kl",), False),
    ("Reward margin of pairs", ("rewards/margins",), False),
    ("Share of pairs ranked rightly", ("rewards/accuracies",), False),
    ("Implicit rewards", ("rewards/chosen", "rewards/rejected"), False),
    ("Log-probabilities", ("logps/chosen", "logps/rejected"), False),
    ("Tokens per answer", ("rollout/length",), False),
    ("Share of answers that end, and of groups that differ", ("rollout/eos_rate", "rollout/live_groups"), False),
    ("Gradient norm", ("train/grad_norm",), True),
    ("Learning rate", ("train/lr",), False),
    ("Tokens per second and process", ("perf/tokens_per_second_per_gpu",), False),
    ("Share of peak FLOP/s", ("perf/mfu",), False),
    ("Seconds of a step", tuple(f"timing/{phase}" for phase in PHASES), False),
    ("Peak memory, GiB", ("memory/peak_*",), False),
)


@dataclass(frozen=True)
class Timing:
    """Wall clock of one step; `reused`: the figure is that of the earlier run which made it."""

    name: str
    processes: int
    seconds: float
    reused: bool


@dataclass(frozen=True)
class ReportInputs:
    """What the report is made of. Stage names are the keys of `evals` and `runs`, in order.

    evals: directory of result files. before: the same of the model before the first stage. runs: run directory.
    decontamination: its report.json. preference: the statistics beside the pairs. configs:
    resolved YAML by step. total_seconds: wall clock of this run of the recipe.
    """

    title: str
    evals: Mapping[str, Path]
    runs: Mapping[str, Path]
    before: Path | None = None
    decontamination: Path | None = None
    preference: Path | None = None
    notes: Sequence[str] = ()
    timings: Sequence[Timing] = ()
    total_seconds: float = 0.0
    configs: Mapping[str, str] = field(default_factory=dict)


Scores = dict[str, list[TaskScores]]


def write_report(inputs: ReportInputs, output: Path) -> Path:
    """Write the report (atomically) and return its path.

    Raises:
        TelemetryError: a file is missing or not in the expected form; the message names it.
    """
    scores = load_scores(inputs)
    parts = [
        _top(inputs, scores),
        *([_score_section(scores), working_section(scores), _sample_section(scores, inputs.before)] if scores else []),
        *_curve_sections(inputs),
        *data_sections(inputs.decontamination, inputs.preference),
        _timing_section(inputs),
        _config_section(inputs),
    ]
    text = page(inputs.title, join(part for part in parts if part))
    write_atomically(output, text)
    return output


def load_scores(inputs: ReportInputs) -> Scores:
    """Results by stage; every stage must have the tasks of the first.

    Raises:
        TelemetryError: see `load_evaluation`, or stages have different tasks.
    """
    scores = {stage: load_evaluation(path) for stage, path in inputs.evals.items()}
    for stage, found in scores.items():
        wanted, there = set(_tasks(scores)), {task.name for task in found}
        if wanted != there:
            names = ", ".join(sorted(wanted ^ there))
            raise TelemetryError(
                f"{inputs.evals[stage]}: not the tasks of {inputs.evals[next(iter(scores))]} ({names})"
            )
    return scores


def score_lines(inputs: ReportInputs) -> list[str]:
    """The score table as text: sampled accuracy in percent with its interval, greedy in brackets."""
    scores = load_scores(inputs)
    if not scores:
        return []
    stages = list(scores)
    rows = [["accuracy in %, sampled (greedy)", *stages]]
    for task in _tasks(scores):
        found = [_find(scores[stage], task) for stage in stages]
        rows.append([f"{task} ({found[0].suite})", *(_plain(each) for each in found)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(scores: TaskScores) -> str:
    greedy = f" ({100 * scores.greedy.value:.1f})" if scores.greedy else ""
    if scores.sampled is None:
        return greedy.strip()
    return f"{_percent(scores.sampled)}{greedy}"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _tasks(scores: Scores) -> list[str]:
    """Task names of the first stage, development suite first."""
    first = next(iter(scores.values()))
    return [task.name for task in sorted(first, key=lambda task: task.suite != "dev")]


def _find(found: Sequence[TaskScores], name: str) -> TaskScores:
    return next(task for task in found if task.name == name)


def _top(inputs: ReportInputs, scores: Scores) -> Html:
    parts: list[object] = [tag("h1", inputs.title)]
    if scores:
        parts.append(tag("p", _headline(scores), class_="headline"))
    parts += [paragraph(note) for note in inputs.notes]
    return join(parts)


def _headline(scores: Scores) -> str:
    """Accuracy at temperature 1 through the stages, task by task."""
    stages = list(scores)
    phrases = []
    for task in _tasks(scores):
        values = [_find(scores[stage], task).headline.value for stage in stages]
        gain = 100 * (values[-1] - values[0])
        phrases.append(f"{task} {' → '.join(f'{100 * value:.0f}' for value in values)} % ({gain:+.0f})")
    first = _find(scores[stages[0]], _tasks(scores)[0])
    how = f"Sampled accuracy at temperature {first.temperature:g}" if first.sampled else "Greedy accuracy"
    return f"{how} on held-out problems, {' → '.join(stages)}: {'; '.join(phrases)}."


def _score_section(scores: Scores) -> Html:
    stages, tasks = list(scores), _tasks(scores)
    rows: list[list[object]] = []
    bars: dict[str, list[Bar]] = {stage: [] for stage in stages}
    for name in tasks:
        found = [_find(scores[stage], name) for stage in stages]
        rows.append([f"{name} ({found[0].suite}, {found[0].items} problems)", *(_cell(each) for each in found)])
        for stage, each in zip(stages, found, strict=True):
            best = each.headline
            bars[stage].append(Bar(100 * best.value, 100 * best.low, 100 * best.high))
    first = _find(scores[stages[0]], tasks[0])
    draws = f"the mean of {first.draws} sampled answers per problem at temperature {first.temperature:g}"
    explained = (
        f"Large figures: {draws}, with {100 * first.confidence:.0f} % bootstrap intervals over problems. Below them: "
        "greedy decoding. The unseen suite was not used to choose settings."
        if first.sampled
        else f"Greedy decoding, with {100 * first.confidence:.0f} % bootstrap intervals over problems."
    )
    plot = bar_plot("Accuracy by stage", tasks, bars, y_label="%", top=100)
    parts = [paragraph(explained), table(["task", *stages], rows), Html(plot), _lost(scores), _kinds(scores)]
    return section("scores", "Scores by stage", *parts)


def _lost(scores: Scores) -> Html:
    """Verdicts that scored 0 because a verifier failed, not because an answer did."""
    lost = {stage: sum({task.suite: task.lost_verdicts for task in found}.values()) for stage, found in scores.items()}
    named = ", ".join(f"{stage} {count}" for stage, count in lost.items() if count)
    return paragraph(f"Verdicts lost to timeouts, crashes or errors, each scored 0: {named}.") if named else Html("")


def _kinds(scores: Scores) -> Html:
    """Scores by class of prompt (kind of constraint, number of calculations)."""
    tables = []
    for name in _tasks(scores):
        found = {stage: _find(each, name) for stage, each in scores.items()}
        kinds = next(iter(found.values())).kinds
        if len(kinds) < 2:
            continue
        rows = [
            [
                kind,
                str(prompts),
                *(f"{100 * each.kinds[kind][0]:.0f}" if kind in each.kinds else "" for each in found.values()),
            ]
            for kind, (_, prompts) in kinds.items()
        ]
        tables.append(table(["kind", "prompts", *found], rows, caption=f"{name}, %"))
    return details("by kind of prompt", *tables) if tables else Html("")


def _cell(scores: TaskScores) -> Html:
    greedy = tag("small", f"greedy {_percent(scores.greedy)}") if scores.greedy else Html("")
    if scores.sampled is None:
        return greedy
    return Html(f"{tag('strong', f'{100 * scores.sampled.value:.1f}')} {_interval(scores.sampled)}<br>{greedy}")


def _interval(interval: Interval) -> Html:
    return tag("small", f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]")


def _sample_section(scores: Scores, before: Path | None) -> Html:
    """The same prompts through all stages, greedy where possible; prompts whose verdict changed come first."""
    parts: list[Html] = []
    earlier = {task.name: task.first_answers() for task in load_evaluation(before)} if before else {}
    for name in _tasks(scores):
        answers = {stage: _find(found, name).first_answers() for stage, found in scores.items()}
        first, last = (next(iter(order)) for order in (answers.values(), reversed(answers.values())))
        if name in earlier:
            answers = {_BEFORE: earlier[name], **answers}
        stages = list(answers)
        prompts = [p for p in first if all(p in answers[stage] for stage in stages)]
        changed = [p for p in prompts if first[p].correct != last[p].correct]
        chosen = [*changed, *(p for p in prompts if p not in changed)][:_SAMPLES_PER_TASK]
        if not chosen:
            continue
        rows = []
        for prompt in chosen:
            cells = []
            for stage in stages:
                answer = answers[stage][prompt]
                mark = tag(
                    "span", "right" if answer.correct else "wrong", class_="right" if answer.correct else "wrong"
                )
                cells.append(Html(f"{mark}{pre(answer.completion)}"))
            rows.append([pre(prompt), *cells])
        parts.append(table(["prompt", *stages], rows, caption=name, numeric=99))
    if not parts:
        return Html("")
    note = "First answers kept for each task; prompts whose verdict changed from the first to the last stage lead."
    if earlier:
        note += f" “{_BEFORE}” is the model that the first stage starts from."
    return section("samples", "Answers before and after", paragraph(note), *parts)


def _curve_sections(inputs: ReportInputs) -> list[Html]:
    return [_curves(stage, _records_of(path / "metrics.jsonl")) for stage, path in inputs.runs.items()]


def _records_of(file: Path) -> list[dict[str, float]]:
    records = read_metrics(file)
    if not records:
        raise TelemetryError(f"{file}: holds no step")
    if lacking := next((number for number, record in enumerate(records, 1) if "step" not in record), None):
        raise TelemetryError(f"{file}:{lacking}: not a metrics record (no step)")
    return records


def _curves(stage: str, records: list[dict[str, float]]) -> Html:
    names = [
        name for name in dict.fromkeys(key for record in records for key in record) if name not in ("step", "time")
    ]

    def series(name: str) -> Series:
        points = [(record["step"], record[name]) for record in records if name in record]
        return Series(name, [x for x, _ in points], [y for _, y in points])

    def plot(title: str, wanted: Sequence[str], log_y: bool) -> Html | None:
        curves = [curve for curve in map(series, wanted) if any(y == y and abs(y) != float("inf") for y in curve.y)]
        positive = all(y > 0 for curve in curves for y in curve.y)
        return Html(line_plot(f"{stage}: {title}", curves, log_y=log_y and positive)) if curves else None

    panels: list[Html | None] = []
    used: set[str] = set()
    for title, wanted, log_y in _PANELS:
        present = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
        used.update(present)
        panels.append(plot(title, present, log_y))
    others = [plot(name, [name], False) for name in names if name not in used]
    parts: list[object] = [tag("div", *(panel for panel in panels if panel), class_="plots")]
    if any(others):
        parts.append(details("other curves", tag("div", *(panel for panel in others if panel), class_="plots")))
    last = int(records[-1]["step"])
    return section(f"run-{stage.lower()}", f"{stage}: training", paragraph(f"{last} steps."), *parts)


def _timing_section(inputs: ReportInputs) -> Html:
    rows = [
        [timing.name, str(timing.processes), f"{timing.seconds:.1f} s", "reused" if timing.reused else ""]
        for timing in inputs.timings
    ]
    rows.append(["all steps", "", duration(sum(timing.seconds for timing in inputs.timings)), ""])
    total = duration(inputs.total_seconds)
    note = f"This run of the recipe took {total}; a step that was interrupted shows its last attempt."
    return section("timings", "Time", paragraph(note), table(["step", "processes", "wall clock", ""], rows))


def _config_section(inputs: ReportInputs) -> Html:
    files = [details(name, pre(text)) for name, text in inputs.configs.items()]
    versions = [["python", platform.python_version()], *([name, _version(name)] for name in _PACKAGES)]
    found = [row for row in versions if row[1]]
    machine = paragraph(f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs.")
    return section("configuration", "Configuration and versions", *files, table(["package", "version"], found), machine)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
