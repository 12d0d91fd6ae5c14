"""What a run leaves behind about its data: the log of samples and the preview of masks, with their verbs."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from tests.training import tiny_run
from tulu_hpc.cli.main import app


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
