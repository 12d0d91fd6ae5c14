"""What a run leaves behind about its data: the log of samples and the preview of masks, with their verbs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.parallel.forked import run_forked
from tests.training import tiny_run
from tulu_hpc.cli.main import app
from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import SftConfig
from tulu_hpc.data.sample_log import SampleAuditError
from tulu_hpc.stages import sft, training_run
from tulu_hpc.training.non_finite import NonFiniteError


def test_two_ranks_two_epochs_with_batches_by_tokens(tmp_path: Path) -> None:
    inputs = tiny_run.write_inputs(tmp_path)
    values = tiny_run.config(inputs, tmp_path / "run", "sft", sft__sum_divisor=6.0, sft__neftune_alpha=5.0)
    values["train"] = {"epochs": 2, "global_batch_tokens": 150, "pack_rows": 128, "export_hf": False}
    file = tiny_run.write_config(values, tmp_path / "sft.yaml")
    code, output = tiny_run.run_to_end("sft", file, processes=2)
    assert code == 0, output
    line = next(line for line in output.splitlines() if "each of 40 was seen" in line)
    assert "on 80 samples: each of 40 was seen 2 times" in line
    assert len(list((tmp_path / "run" / "samples").glob("from_00000000_dp_*.jsonl"))) == 2
    masks = (tmp_path / "run" / "masks.html").read_text()
    assert masks.count("<details open>") == 12 and "40 of 40 rows" in masks

    shown = CliRunner().invoke(app, ["data", "samples", str(tmp_path / "run")])
    assert shown.exit_code == 0 and "80 samples" in shown.output


def test_preview_before_training(tmp_path: Path) -> None:
    inputs = tiny_run.write_inputs(tmp_path)
    file = tmp_path / "dpo.yaml"
    file.write_text(yaml.safe_dump(tiny_run.config(inputs, tmp_path / "run", "dpo")))
    target = tmp_path / "elsewhere" / "page.html"
    done = CliRunner().invoke(app, ["data", "preview", str(file), "--rows", "3", "--output", str(target)])
    assert done.exit_code == 0, done.output
    assert str(target) in done.output and target.read_text().count(">rejected</h3>") == 3
    assert not (tmp_path / "run").exists()


def two_ranks(run: Callable[[SftConfig], Path], file: Path) -> list[str]:
    """What each of two ranks ends with: nothing, or the error."""

    def body() -> str:
        try:
            run(load_config(file, (), SftConfig))
        except SampleAuditError as error:
            return str(error)
        return ""

    return run_forked(2, body)


def test_a_log_that_is_missing_or_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stopped after step 2; then the log is of other data, has a gap (both on every rank), or is gone."""
    inputs = tiny_run.write_inputs(tmp_path)
    values = tiny_run.config(inputs, tmp_path / "run", "sft", train__steps=4)
    file = tiny_run.write_config(values, tmp_path / "sft.yaml")
    samples = tmp_path / "run" / "samples"

    def stop_after_two() -> None:
        step = training_run.train_step

        def stopping(trainer: Any, *arguments: Any, **options: Any) -> Any:
            if trainer.step == 2:
                raise NonFiniteError("stop", {})
            return step(trainer, *arguments, **options)

        training_run.train_step = stopping  # of this forked process
        with pytest.raises(NonFiniteError):
            sft.run(load_config(file, (), SftConfig))

    run_forked(2, stop_after_two)
    ids = (samples / "items.txt").read_text()
    (samples / "items.txt").write_text("x\n")
    first, second = two_ranks(sft.run, file)
    assert "holds the ids of other data" in first and first == second
    (samples / "items.txt").write_text(ids)
    for log in samples.glob("from_*"):
        log.rename(tmp_path / log.name)
    first, second = two_ranks(sft.run, file)
    assert "step 1 is missing" in first and f"without {samples}" in first and first == second
    assert not (tmp_path / "run" / "finished.json").exists()
    shutil.rmtree(samples)
    assert two_ranks(sft.run, file) == ["", ""]
    assert (tmp_path / "run" / "finished.json").exists() and not samples.exists()
    assert "no sample log: the first 4 steps" in capfd.readouterr().out
