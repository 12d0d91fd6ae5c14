"""The rendered batch script and what is refused before submission. tests/engines/test_slurm.py runs it for real."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import SftConfig
from tulu_hpc.launch.job import prepare
from tulu_hpc.launch.slurm import LaunchError, SlurmJob, parse_environment, render, submit, time_limit_seconds


def job(**changes: object) -> SlurmJob:
    values: dict[str, object] = {
        "arguments": ["sft", "/data/my config.yaml"], "run_dir": Path("/runs/a"), "nodes": 2, "processes_per_node": 8,
        "gpus_per_node": 8, "python": "/env/bin/python", "work_dir": Path("/work dir"),
    }  # fmt: skip
    return SlurmJob(**{**values, **changes})  # type: ignore[arg-type]


def test_script_is_valid_bash_and_quotes() -> None:
    script = render(job(environment={"A": "b c'd"}, setup=["module load cuda"], sbatch_options=["--exclude=n1"]))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --exclude=n1", "#SBATCH --signal=B:USR1@600",
        "#SBATCH --requeue", "#SBATCH --open-mode=append", "module load cuda", "cd '/work dir'",
        """export A='b c'"'"'d'""",
    ):  # fmt: skip
        assert line in script.splitlines(), line
    assert "sft '/data/my config.yaml' &" in script
    assert "--nproc-per-node=8" in script


@pytest.mark.parametrize("name", ["python", "my python", "it's; echo no", "$HOME `id`"])
def test_any_interpreter_reaches_the_command(tmp_path: Path, name: str) -> None:
    """The srun line is run as it is rendered, with an interpreter that says under which name it was started."""
    python = tmp_path / name
    python.write_text('#!/bin/sh\necho "$0"\n')
    python.chmod(0o755)
    script = render(job(python=str(python)))
    command = script[script.index("bash -c") : script.index(" &\nstep=")]
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout == f"{python}\n"


def test_all_directives_stand_before_the_first_command() -> None:
    """Slurm ignores #SBATCH lines after the first command."""
    lines = render(job(partition="p", account="a", exclusive=True, cpus_per_task=4)).splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert sum(line.startswith("#SBATCH") for line in lines) == 13


def test_options_left_out_leave_no_line() -> None:
    script = render(job(gpus_per_node=0))
    for word in ("gpus-per-node", "partition", "account", "cpus-per-task", "exclusive"):
        assert word not in script


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("2:30", 150), ("1:00:00", 3600), ("1-0", 86400), ("2-01:30", 178200), ("1-1:1:1", 90061)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_limit": "soon"}, "time 'soon': expected"),
        ({"time_limit": "5"}, "leaves nothing before the request to save"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"run_dir": Path("/runs/a b")}, "cannot contain blanks"),
        ({"job_name": "a\n#SBATCH --exclusive"}, "job-name 'a.*': an #SBATCH line takes one word"),
        ({"job_name": "a b"}, "job-name 'a b': an #SBATCH line takes one word"),
        ({"partition": "p\nrm -rf x"}, "partition .*: an #SBATCH line takes one word"),
        ({"account": "a\r"}, "account .*: an #SBATCH line takes one word"),
        ({"sbatch_options": ["--exclude=n1", "--x\necho"]}, "sbatch '--x.*': one line"),
        ({"srun_options": "--mpi=none\n"}, "srun '--mpi=none.*': one line"),
        ({"time_limit": "24:00:00\n"}, "time '24:00:00.*': expected"),
    ],
)
def test_bad_jobs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        job(**changes)


def test_template_mistakes_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.j2").write_text("{{ nodez }}")
    with pytest.raises(LaunchError, match=r"t\.j2.*'nodez' is undefined"):
        render(job(), tmp_path / "t.j2")
    with pytest.raises(LaunchError, match=r"no batch template at .*none"):
        render(job(), tmp_path / "none")


def test_environment_assignments() -> None:
    assert parse_environment(["A=b=c", "D="]) == {"A": "b=c", "D": ""}
    with pytest.raises(LaunchError, match="expected NAME=VALUE"):
        parse_environment(["1A=b"])


@pytest.fixture
def config(tmp_path: Path) -> SftConfig:
    text = "model: {path: m}\ndata: {path: d}\noptimizer: {lr: 1}\ntrain: {steps: 1, global_batch_size: 1}\n"
    (tmp_path / "c.yaml").write_text(text)
    return load_config(
        tmp_path / "c.yaml", [f"run.root={tmp_path}", "parallel.tensor=8", "parallel.pipeline=2"], SftConfig
    )


def test_run_directory_and_configuration_are_fixed(config: SftConfig, tmp_path: Path) -> None:
    prepared = prepare(config, "sft", nodes=2, gpus_per_node=8)
    assert prepared.config.run.dir == str(prepared.run_dir) and prepared.run_dir.parent == tmp_path
    assert not prepared.run_dir.exists()  # a dry run writes nothing
    assert f"sft {prepared.run_dir}/config.submitted.yaml &" in prepared.script


def test_layout_must_divide_the_processes(config: SftConfig) -> None:
    with pytest.raises(
        LaunchError, match=r"3 nodes x 8 processes = 24 cannot be divided into replicas of tensor 8 x pipeline 2"
    ):
        prepare(config, "sft", nodes=3, gpus_per_node=8)
    with pytest.raises(LaunchError, match="give --gpus-per-node"):
        prepare(config, "sft", nodes=3, gpus_per_node=0)


def test_without_slurm_submission_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch: not found"):
        submit("", tmp_path / "job")
