"""The report's sections on data: what decontamination found, and what the preference pairs are like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tulu_hpc.telemetry.html import Html, details, join, paragraph, section, table
from tulu_hpc.telemetry.metrics import TelemetryError
from tulu_hpc.telemetry.results import read_json

_SPANS_SHOWN = 5


def data_sections(decontamination: Path | None, preference: Path | None) -> list[Html]:
    """Both sections, or those whose file is given.

    Raises:
        TelemetryError: a file is missing or lacks a field.
    """
    parts: list[Html] = []
    if decontamination is not None:
        report = read_json(decontamination, "data decontaminate")
        parts.append(_guarded(decontamination, lambda: _decontamination(report)))
    if preference is not None:
        statistics = read_json(preference, "data prefer")
        parts.append(_guarded(preference, lambda: _preference(statistics)))
    return parts


def _guarded(path: Path, make: Any) -> Html:
    try:
        made: Html = make()
    except (KeyError, TypeError, AttributeError) as error:
        raise TelemetryError(f"{path}: not in the expected form ({type(error).__name__}: {error})") from error
    return made


def _decontamination(report: Mapping[str, Any]) -> Html:
    """Overlaps by source and evaluation, recall of planted leaks, and examples of shared spans."""
    rule = (
        f"Words of an evaluation prompt match when they lie in a run of {report['ngram']} that a training prompt also "
        f"has. A prompt overlaps when more than {100 * report['match_threshold']:.0f} % of its words match the same "
        "training prompt; a source is contaminated when it overlaps more than "
        f"{100 * report['contamination_threshold']:.0f} % of an evaluation. Action: {report['action']}."
    )
    rows = []
    for source in report["sources"]:
        overlaps = [each for each in source["evals"] if each["overlapping"]]
        names = ", ".join(f"{each['eval']} {100 * each['rate']:.1f} %" for each in overlaps) or "none"
        marks = ", ".join(each["eval"] for each in overlaps if each["contaminated"]) or "none"
        rows.append([source["name"], names, marks, str(source["rows"]), str(source["removed"]), str(source["kept"])])
    headers = ["source", "overlapped share of evaluations", "contaminated by", "rows", "removed", "kept"]
    parts: list[object] = [paragraph(rule), table(headers, rows, numeric=3)]
    if report.get("planted") is not None:
        parts.append(_planted(report["planted"]))
    spans = [
        [source["name"], match["eval"], f"{100 * match['score']:.0f} %", " … ".join(match["spans"])]
        for source in report["sources"]
        for match in source["matches"][:_SPANS_SHOWN]
    ]
    if spans:
        found = table(["source", "evaluation", "share", "words in common"], spans, numeric=99)
        parts.append(details("examples of what matched", found))
    return section("decontamination", "Decontamination", *parts)


def _planted(planted: Mapping[str, Any]) -> Html:
    rows = [
        [
            edit.replace("_", " "),
            str(counts["planted"]),
            str(counts["found"]),
            _share(counts["found"], counts["planted"]),
        ]
        for edit, counts in planted["by_edit"].items()
    ]
    rows.append(["all", str(planted["planted"]), str(planted["found"]), _share(planted["found"], planted["planted"])])
    note = (
        f"Evaluation prompts were planted in the sources on purpose. Found: {planted['found']} of "
        f"{planted['planted']}; removed: {planted['removed']}. Rows removed that nobody planted: "
        f"{planted['false_drops']} "
        f"({100 * planted['false_drop_share']:.2f} % of all others)."
    )
    return join([paragraph(note), table(["planted as", "planted", "found", "recall"], rows, caption="Recall of leaks")])


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"


def _preference(statistics: Mapping[str, Any]) -> Html:
    """Pairs by source, why prompts gave none, mean scores."""
    by_source = [
        [source, str(count), str(statistics["pairs_by_source"].get(source, 0))]
        for source, count in sorted(statistics["prompts_by_source"].items())
    ]
    by_source.append(["all", str(statistics["prompts"]), str(statistics["pairs"])])
    note = (
        f"{statistics['samples']} answers to {statistics['prompts']} prompts, of which "
        f"{100 * statistics['finished_share']:.1f} % ended by themselves, with a mean score of "
        f"{statistics['mean_score']:.3f}. A pair needs a better and a worse answer: "
        f"{statistics['no_pair_equal_scores']} prompts had answers of one score only, "
        f"{statistics['no_pair_unfinished']} no better answer that ended. Mean score of chosen answers "
        f"{statistics['mean_chosen_score']:.3f}, of rejected ones {statistics['mean_rejected_score']:.3f}."
    )
    return section("preference", "Preference pairs", paragraph(note), table(["source", "prompts", "pairs"], by_source))
