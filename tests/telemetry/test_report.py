"""The report from files that the real evaluation, curation and metric code wrote (no model is run)."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tulu_hpc.config.run_directory import RunDirectory
from tulu_hpc.curation.decontamination import EvalSet, TrainSet, decontaminate
from tulu_hpc.curation.preference import PreferenceStatistics, ScoredSample, binarise
from tulu_hpc.evaluation.runner import Answer, RunOptions, load_task, summarise
from tulu_hpc.evaluation.suites import dev_task
from tulu_hpc.rollout.engine import Sampling
from tulu_hpc.telemetry.metrics import MetricLogger, TelemetryError
from tulu_hpc.telemetry.report import ReportInputs, Timing, score_lines, write_report
from tulu_hpc.telemetry.results import load_evaluation

EVIL = "<script>alert('&')</script>"
QUESTION = "Tom has {n} apples and Tom buys 5 more of them today. How many now?"


class Outline(HTMLParser):
    """Tags and texts; fails on a tag that is closed and was not open."""

    VOID = {"meta", "br", "!doctype"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _evaluation(directory: Path, data: Path, right: int, shown: bool) -> None:
    """Results of 4 problems with 1 greedy and 2 sampled answers each, the first `right` problems answered rightly."""
    data.write_text(
        "".join(json.dumps({"question": QUESTION.format(n=n), "answer": f"#### {n + 5}"}) + "\n" for n in range(4))
    )
    loaded = load_task("math_dev", dev_task("gsm8k"), str(data))
    options = RunOptions(True, 2, Sampling(8), 200, 0.95, 4, 0)
    answers = []
    for number in range(4):
        score = float(number < right)
        metrics = {"finished": 1.0, "shows_working": float(shown), "shows_working_and_correct": shown * score}
        text = f"{number}+5={number + 5} {EVIL}" if shown else EVIL
        answers += [Answer(number, mode, text, score, "", metrics, 5) for mode in ("greedy", "sampled", "sampled")]
    results = {
        "suite": "dev",
        "model": {"fingerprint": "f0"},
        "settings": {"temperature": 1.0, "confidence": 0.95},
        "tasks": {"math_dev": summarise(loaded, answers, options)},
        "verifier": {"verdicts": 12, "timeouts": 1, "crashes": 0, "garbage": 0, "errors": 2, "restarts": 1},
    }
    directory.mkdir()
    (directory / "dev.json").write_text(json.dumps(results))


@pytest.fixture
def inputs(tmp_path: Path) -> ReportInputs:
    for stage, right in (("sft", 1), ("rlvr", 3)):
        _evaluation(tmp_path / stage, tmp_path / "math_dev.jsonl", right, shown=stage == "rlvr")
        with MetricLogger(RunDirectory(tmp_path / f"run_{stage}"), tensorboard=False) as logger:
            for step in range(1, 30):
                logger.log(step, {"train/loss": 1 / step, "train/grad_norm": float("nan"), "timing/step": 0.1})
    train = tmp_path / "train.jsonl"
    turns = [QUESTION.format(n=1), "Something else altogether, with more than eight words in it."]
    train.write_text("".join(json.dumps({"messages": [{"role": "user", "content": turn}]}) + "\n" for turn in turns))
    report = decontaminate(
        [TrainSet(f"train{EVIL}", str(train))],
        [EvalSet.read("math_dev", str(tmp_path / "math_dev.jsonl"), ["question"])],
        None,
        action="drop_rows",
        planted=[{"source": f"train{EVIL}", "line": 1, "edit": "verbatim"}],
    )
    (tmp_path / "report.json").write_text(json.dumps(report.to_json()))
    statistics = PreferenceStatistics()
    samples = [ScoredSample("a", 1.0), ScoredSample("b", 0.0)]
    statistics.add(samples, binarise(samples, seed=0), "math")
    statistics.add(samples[:1], binarise(samples[:1], seed=0), "math")
    (tmp_path / "pairs.stats.json").write_text(json.dumps(statistics.summary()))
    return ReportInputs(
        title=f"Report {EVIL}",
        evals={"SFT": tmp_path / "sft", "RLVR": tmp_path / "rlvr"},
        runs={"SFT": tmp_path / "run_sft", "RLVR": tmp_path / "run_rlvr"},
        decontamination=tmp_path / "report.json",
        preference=tmp_path / "pairs.stats.json",
        notes=[EVIL],
        timings=[Timing("sft", 2, 12.0, False), Timing("eval", 1, 3.0, True)],
        total_seconds=15.0,
        configs={"sft": f"run: {EVIL}\n"},
    )


def test_report_is_whole_self_contained_and_escaped(inputs: ReportInputs, tmp_path: Path) -> None:
    path = write_report(inputs, tmp_path / "out" / "report.html")
    text = path.read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.open == [] and {"h1", "table", "svg", "details", "section"} <= outline.tags
    assert not {"script", "link", "img", "iframe", "object"} & outline.tags
    assert all(link.startswith("#") for link in outline.links)
    plain = " ".join(outline.text)
    assert "math_dev 25 → 75 % (+50)" in plain and "SFT → RLVR" in plain
    assert "1 of 1" in plain and "1 of 1; removed: 1" in plain.replace("\n", " ")
    assert "2 prompts" in plain and EVIL in plain and EVIL not in text
    assert list(path.parent.iterdir()) == [path]  # nothing half-written beside it


def test_answers_before_training_and_lost_verdicts(inputs: ReportInputs, tmp_path: Path) -> None:
    _evaluation(tmp_path / "initial", tmp_path / "math_dev.jsonl", 0, shown=False)
    plain = [Outline(), Outline()]
    for outline, before in zip(plain, (None, tmp_path / "initial"), strict=True):
        outline.feed(write_report(replace(inputs, before=before), tmp_path / "report.html").read_text())
    assert "before training" not in plain[0].text and plain[1].text.count("before training") == 1
    # Three prompts: one more column of answers, all wrong.
    assert plain[1].text.count("wrong") == plain[0].text.count("wrong") + 3
    assert "Verdicts lost to timeouts, crashes or errors, each scored 0: SFT 3, RLVR 3." in plain[1].text


def test_console_table(inputs: ReportInputs) -> None:
    header, row = score_lines(inputs)
    assert header.split() == ["accuracy", "in", "%,", "sampled", "(greedy)", "SFT", "RLVR"]
    assert row.startswith("math_dev (dev)") and "25.0 [" in row and "75.0 [" in row and "(75.0)" in row


def test_working_is_read_from_the_evaluation(inputs: ReportInputs) -> None:
    before, after = (load_evaluation(inputs.evals[stage])[0].working for stage in ("SFT", "RLVR"))
    assert before is not None and (before.share, before.share_correct, before.accuracy) == (0.0, 0.0, 0.25)
    assert after is not None and (after.share, after.share_correct, after.accuracy) == (1.0, 0.75, 0.75)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("sft/dev.json", "neither dev.json nor unseen.json"),
        ("run_rlvr/metrics.jsonl", "metrics.jsonl: not found"),
        ("report.json", "report.json: not found .*data decontaminate"),
        ("pairs.stats.json", "pairs.stats.json: not found .*data prefer"),
    ],
)
def test_missing_file_is_an_error(inputs: ReportInputs, tmp_path: Path, gone: str, message: str) -> None:
    (tmp_path / gone).unlink()
    with pytest.raises(TelemetryError, match=message):
        write_report(inputs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["sft/dev.json", "report.json", "pairs.stats.json"])
def test_file_of_another_form_is_an_error(inputs: ReportInputs, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"tasks": {"a": {}}}')
    with pytest.raises(TelemetryError, match="not in the expected form"):
        write_report(inputs, tmp_path / "report.html")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "metrics.jsonl: holds no step"),
        ("{", "metrics.jsonl: holds no step"),
        ('{"a": 1}\n', "metrics.jsonl:1: .*no step"),
    ],
)
def test_metrics_without_steps_are_an_error(inputs: ReportInputs, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run_rlvr" / "metrics.jsonl").write_text(text)
    with pytest.raises(TelemetryError, match=message):
        write_report(inputs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_suites_of_different_models_are_refused(inputs: ReportInputs, tmp_path: Path) -> None:
    """As when the development suite was run again, with another model, into the same directory."""
    results = json.loads((tmp_path / "sft" / "dev.json").read_text())
    results["model"]["fingerprint"] = "f1"
    (tmp_path / "sft" / "unseen.json").write_text(json.dumps(results))
    with pytest.raises(TelemetryError, match=r"sft: dev\.json and unseen\.json are of different models"):
        write_report(inputs, tmp_path / "report.html")


def test_stages_with_different_tasks_are_refused(inputs: ReportInputs, tmp_path: Path) -> None:
    path = tmp_path / "rlvr" / "dev.json"
    results = json.loads(path.read_text())
    results["tasks"]["other"] = results["tasks"]["math_dev"]
    path.write_text(json.dumps(results))
    with pytest.raises(TelemetryError, match=r"not the tasks of .*sft \(other\)"):
        write_report(inputs, tmp_path / "report.html")
