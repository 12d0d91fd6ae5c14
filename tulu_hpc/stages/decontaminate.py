"""Removing evaluation prompts from training sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tulu_hpc.config.schema import DecontaminateConfig
from tulu_hpc.curation.decontamination import EvalSet, Report, TrainSet, decontaminate
from tulu_hpc.stages.step_files import check_files
from tulu_hpc.stages.tables import print_table


def run(config: DecontaminateConfig) -> Path:
    """Write `output`/<source>.jsonl with what is left of each source, and `output`/report.json; return its path.

    Raises:
        ConfigError: a file of the output would replace one that is read, or the output cannot be written there.
        RecordError: a malformed row of a source or an evaluation.
        ValueError: the side file of planted leaks is none, or not of these sources.
    """
    check_files(config)
    section = config.decontaminate
    output = Path(section.output)
    output.mkdir(parents=True, exist_ok=True)
    report = decontaminate(
        [TrainSet(source.name, source.path) for source in section.train],
        [EvalSet.read(each.name, each.path, each.fields, unseen=each.unseen) for each in section.evals],
        output,
        ngram=section.ngram,
        match_threshold=section.match_threshold,
        contamination_threshold=section.contamination_threshold,
        action=section.action,
        planted=None if section.planted is None else _read_planted(Path(section.planted)),
    )
    path = output / "report.json"
    path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    _print(report)
    print(f"report: {path}")
    return path


class _Leak(BaseModel):
    source: str
    line: int
    edit: str = ""


class _Leaks(BaseModel):
    rows: list[_Leak]


def _read_planted(path: Path) -> list[dict[str, Any]]:
    try:
        leaks = _Leaks.model_validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: not a side file of planted leaks: {where}: {first['msg']}") from None
    return [{**leak.model_dump(), "where": f"{path}: rows.{number}"} for number, leak in enumerate(leaks.rows)]


def _print(report: Report) -> None:
    table: list[list[object]] = []
    for source in report.sources:
        for each in source.evals:
            if each.overlapping:
                verdict = "contaminated" if each.contaminated else "below the threshold"
                row = [source.name, each.eval, each.overlapping, each.instances, f"{each.rate:.1%}", each.rows]
                table.append([*row, verdict, each.action])
    headers = ["source", "evaluation", "overlapping", "of", "share", "matching rows", "verdict", "action"]
    if table:
        print_table(headers, table)
    else:
        print("no source overlaps with any evaluation")
    print_table(
        ["source", "rows", "removed", "kept", "removed share"],
        [[s.name, s.rows, s.removed, s.kept, f"{s.removed / max(1, s.rows):.2%}"] for s in report.sources],
    )
    if report.planted is not None:
        found = report.planted
        print(
            f"planted leaks: {found['found']} of {found['planted']} found, {found['removed']} removed; "
            f"{found['false_drops']} other rows removed ({found['false_drop_share']:.2%})"
        )
