"""metrics.jsonl, TensorBoard events and the progress line."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tulu_hpc.config.run_directory import RunDirectory
from tulu_hpc.telemetry.metrics import MetricLogger, TelemetryError, read_metrics, truncate_after
from tulu_hpc.telemetry.progress import Progress, duration


def test_one_valid_json_object_per_step(tmp_path: Path) -> None:
    paths = RunDirectory(tmp_path)
    with MetricLogger(paths, tensorboard=False) as logger:
        logger.log(1, {"train/loss": 2.5, "count": 3, "ok": True})
        logger.log(2, {"train/loss": math.nan, "up": math.inf, "down": -math.inf})
    lines = paths.metrics.read_text().splitlines()
    # parse_constant is called for NaN and Infinity written as bare words, which are not JSON.
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first["step"] == 1 and first["train/loss"] == 2.5 and first["count"] == 3 and first["ok"] == 1
    assert second["train/loss"] == "NaN" and second["up"] == "Infinity" and second["down"] == "-Infinity"
    records = read_metrics(paths.metrics)
    assert math.isnan(records[1]["train/loss"]) and records[1]["up"] == math.inf


def test_each_step_is_on_disk_before_the_next(tmp_path: Path) -> None:
    logger = MetricLogger(RunDirectory(tmp_path), tensorboard=False)
    logger.log(1, {"a": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    logger.close()


def test_resume_leaves_no_duplicates_and_no_half_line(tmp_path: Path) -> None:
    paths = RunDirectory(tmp_path)
    with MetricLogger(paths) as logger:
        for step in range(1, 6):
            logger.log(step, {"a": step})
    with paths.metrics.open("a") as file:
        file.write('{"step": 6, "ti')
    with MetricLogger(paths, resume_step=3) as logger:
        logger.log(4, {"a": 40})
    assert [(r["step"], r["a"]) for r in read_metrics(paths.metrics)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_resumed_run_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = RunDirectory(tmp_path)
    with MetricLogger(paths) as logger:
        for step in range(1, 6):
            logger.log(step, {"train/loss": float(step)})
    with MetricLogger(paths, resume_step=3) as logger:
        logger.log(4, {"train/loss": 40.0})
    accumulator = EventAccumulator(str(paths.events))
    accumulator.Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_file_that_is_not_ours_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("something else\nof two lines\n")
    with pytest.raises(TelemetryError, match=r"metrics\.jsonl:1: not a metrics record"):
        truncate_after(path, 0)
    assert path.read_text().startswith("something")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricLogger(RunDirectory(tmp_path / "run"), enabled=False, wandb=True) as logger:
        logger.log(1, {"a": 1.0})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("metrics", [{"a": "text"}, {"a": None}, {"step": 1}, {"time": 1.0}])
def test_bad_values_are_refused(tmp_path: Path, metrics: dict[str, object]) -> None:
    with MetricLogger(RunDirectory(tmp_path), tensorboard=False) as logger, pytest.raises(TelemetryError):
        logger.log(1, metrics)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_missing_wandb_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TelemetryError, match=r"pip install 'tulu-hpc\[wandb\]'"):
        MetricLogger(RunDirectory(tmp_path), tensorboard=False, wandb=True)


def test_sinks_do_not_import_torch_or_tensorflow(tmp_path: Path) -> None:
    """Says nothing about tensorflow where it is not installed."""
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as N\n"
        "from tulu_hpc.telemetry.metrics import MetricLogger\n"
        f"r = Path({str(tmp_path)!r}); MetricLogger(N(root=r, metrics=r / 'm', events=r / 'e')).log(1, {{'a': 1.0}})\n"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_line_has_rate_values_and_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("sft", 10, stream=stream, interval=0.0, clock=clock)
    for step in (1, 2):
        clock.now += 2.0
        progress.update(step, tokens=1000, loss=0.5, reward=7.25)
    assert stream.getvalue().splitlines()[-1] == "sft 2/10  500 tokens/s  loss 0.5  reward 7.25  16 s left"


def test_progress_is_rate_limited_and_shows_the_last_step() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("sft", 100, stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.1
            progress.update(step, tokens=10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].startswith("sft 1/100") and lines[-1].startswith("sft 100/100")


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    stream, clock = Terminal(), Clock()
    with Progress("sft", 3, start=1, stream=stream, interval=0.0, clock=clock) as progress:
        for step in (2, 3):
            clock.now += 1.0
            progress.update(step, loss=1.0)
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().count("\r") == 2


def test_progress_elsewhere_prints_nothing() -> None:
    stream = io.StringIO()
    with Progress("sft", 3, enabled=False, stream=stream) as progress:
        progress.update(1)
    assert stream.getvalue() == ""


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 59.4, 185, 7800)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]
