"""Run directories: naming, resolved configuration, and the refusal to resume something else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tulu_hpc.config.loader import ConfigError, load_config
from tulu_hpc.config.run_directory import RunDirectory
from tulu_hpc.config.schema import SftConfig

TEXT = "model: {path: m}\ndata: {path: d}\noptimizer: {lr: 1e-3}\ntrain: {steps: 4, global_batch_size: 8}\n"


def config(tmp_path: Path, *overrides: str) -> SftConfig:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    return load_config(path, [f"run.root={tmp_path}/runs", *overrides], SftConfig)


def test_new_directory_is_named_and_holds_the_configuration(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    run = RunDirectory.open(wanted, verb="sft")
    assert re.fullmatch(r"sft-\d{8}-\d{6}-[0-9a-f]{4}", run.root.name)
    assert load_config(run.resolved_config, [], SftConfig) == wanted
    assert [p.name for p in run.root.iterdir()] == ["config.resolved.yaml"]
    assert RunDirectory.open(wanted, verb="sft").root != run.root


def test_same_configuration_reopens(tmp_path: Path) -> None:
    wanted = config(tmp_path, "run.dir={root}/a")
    assert RunDirectory.open(wanted, verb="sft") == RunDirectory.open(wanted, verb="sft")


def test_layout_may_differ(tmp_path: Path) -> None:
    RunDirectory.open(config(tmp_path, "run.dir={root}/a"), verb="sft")
    other = ["parallel.tensor=2", "parallel.distributed_optimizer=false", "train.log_every=7", "telemetry.wandb=true"]
    other += ["parallel.pipeline=4", "parallel.first_stage_layers=1", "parallel.last_stage_layers=1"]
    other += ["parallel.overlap_grad_reduce=true", "parallel.gradient_bucket_size=1000"]
    other += ["train.nan_watch=always", "train.export_hf=false"]
    changed = config(tmp_path, "run.dir={root}/a", *other, "train.async_save=false", "train.best_metric=train/loss")
    run = RunDirectory.open(changed, verb="sft")
    assert load_config(run.resolved_config, [], SftConfig).parallel.tensor == 2


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    RunDirectory.open(config(tmp_path, "run.dir={root}/a"), verb="sft")
    changed = config(tmp_path, "run.dir={root}/a", "optimizer.lr=2e-3", "data.path=e", "train.epochs=2")
    with pytest.raises(ConfigError) as error:
        RunDirectory.open(changed, verb="sft")
    for part in ("optimizer.lr: 0.001 -> 0.002", "data.path: ['d'] -> ['e']", "train.epochs: None -> 2.0"):
        assert part in str(error.value)
    assert "train.steps" not in str(error.value)


def test_directory_of_another_verb_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.open(config(tmp_path, "run.dir={root}/a"), verb="sft")
    run.resolved_config.write_text("rlvr: {}\n")
    with pytest.raises(ConfigError, match="was not made by `sft`"):
        RunDirectory.open(config(tmp_path, "run.dir={root}/a"), verb="sft")


def test_other_processes_follow_the_main_one(tmp_path: Path) -> None:
    """The answer travels through `broadcast`; the others write nothing. No real process group is used here."""
    sent: list[str] = []

    def send(text: str) -> str:
        sent.append(text)
        return text

    wanted = config(tmp_path)
    main = RunDirectory.open(wanted, verb="sft", is_main=True, broadcast=send)
    other = RunDirectory.open(wanted, verb="sft", is_main=False, broadcast=lambda _: sent[0])
    assert main == other and len(list((tmp_path / "runs").iterdir())) == 1


def test_a_refusal_is_raised_on_every_process(tmp_path: Path) -> None:
    RunDirectory.open(config(tmp_path, "run.dir={root}/a"), verb="sft")
    changed = config(tmp_path, "run.dir={root}/a", "optimizer.lr=2e-3")
    sent: list[str] = []
    with pytest.raises(ConfigError):
        RunDirectory.open(changed, verb="sft", is_main=True, broadcast=lambda text: sent.append(text) or text)  # type: ignore[func-returns-value]
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        RunDirectory.open(changed, verb="sft", is_main=False, broadcast=lambda _: sent[0])
