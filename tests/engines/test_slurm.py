"""A training run under a real Slurm: two nodes, tensor parallel across them, saved on request, queued again, finished.

Everything runs on this machine's loopback with gloo; that a real network or NCCL works is not shown here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.slurm_cluster import SlurmCluster, install, wait_for
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import load_config
from tulu_hpc.config.schema import SftConfig
from tulu_hpc.data.tokenizer import train_tokenizer
from tulu_hpc.launch.job import PreparedJob, prepare
from tulu_hpc.models.initialise import random_hf_model

REPOSITORY = Path(__file__).parents[2]
STEPS = 40  # enough that the request to stop comes before the end also on a fast machine

CONFIG = """\
run: {{name: slurm, root: {root}, seed: 3}}
model: {{path: {root}/model}}
parallel: {{tensor: 2}}
data: {{path: {root}/data.jsonl, max_length: 64}}
optimizer: {{lr: 1e-3, warmup_ratio: 0.1}}
train: {{steps: {steps}, global_batch_size: 8, pack_rows: 256, export_hf: false}}
"""

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    reason = install()
    if reason is not None:
        pytest.skip(f"no Slurm: {reason}")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=2)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, tokenizer and conversations."""
    root = tmp_path_factory.mktemp("run")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} plus {a % 7}?"},
                {"role": "assistant", "content": f"The answer is {a + a % 7}."},
            ]
        }
        for a in range(64)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([message["content"] for row in rows for message in row["messages"]], vocab_size=320)
    shape = Architecture(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    random_hf_model(shape, root / "model", seed=0, embedding_std=0.1, linear_std=0.1, scale_residual_outputs=True)
    tokenizer.save_pretrained(root / "model")
    path = root / "sft.yaml"
    path.write_text(CONFIG.format(root=root, steps=STEPS))
    return path


def prepared(config_path: Path, name: str) -> PreparedJob:
    config = load_config(config_path, [f"run.dir={{root}}/{name}"], SftConfig)
    return prepare(
        config,
        "sft",
        nodes=2,
        gpus_per_node=0,
        processes_per_node=1,
        cpus_per_task=1,
        time_limit="10:00",
        save_seconds=60,
        master_addr="127.0.0.1",  # the virtual nodes' names do not resolve
        environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"},
        work_dir=config_path.parent,
    )


def submit(cluster: SlurmCluster, job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return job.submit()


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; the file holds each step once."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [row["step"] for row in rows]
    assert len(steps) == len(set(steps))
    return {row["step"]: row["train/loss"] for row in rows}


def complete_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def outputs(run_dir: Path) -> str:
    logs = [*run_dir.glob("logs/slurm-*.txt"), *run_dir.glob("logs/*/node*/**/std*.log")]
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in logs)


def test_nodes_are_two(cluster: SlurmCluster) -> None:
    printed = cluster.run("srun", "-N2", "bash", "-c", "echo $SLURM_NODEID $SLURMD_NODENAME")
    assert sorted(printed.split()) == ["0", "1", "node0", "node1"]


def test_saved_requeued_and_finished_equals_uninterrupted(
    cluster: SlurmCluster, config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared(config_path, "whole")
    job_id = submit(cluster, whole, monkeypatch)
    state = cluster.wait_for_state(job_id, {"COMPLETED", "FAILED"}, seconds=300)
    assert state == "COMPLETED", outputs(whole.run_dir)
    expected = losses(whole.run_dir)
    assert sorted(expected) == list(range(1, STEPS + 1))
    logs = whole.run_dir / "logs" / f"{job_id}-0"
    assert {path.name for path in logs.iterdir()} == {"node0", "node1"}
    assert len(list(logs.glob("node*/**/stdout.log"))) == 2  # one per rank

    job = prepared(config_path, "requeued")
    job_id = submit(cluster, job, monkeypatch)
    wait_for(lambda: complete_lines(job.run_dir) >= 2, 240, "first steps", interval=0.05)
    # What --signal=B:USR1@60 does 60 s before the time limit.
    cluster.run("scancel", "--signal=USR1", "--batch", job_id)
    cluster.wait_for_state(job_id, {"PENDING"}, seconds=180)
    assert cluster.job(job_id)["Restarts"] == "1"
    stopped_at = complete_lines(job.run_dir)
    assert 2 <= stopped_at < STEPS, "the run was over before the signal arrived: give it more steps"
    assert list((job.run_dir / "checkpoints").glob("step_*"))
    assert not (job.run_dir / "preempted").exists()
    # Slurm holds a requeued job back for about two minutes. Shorten that, but not to nothing: a job that starts in the
    # second in which it was requeued is taken by slurmd for the old one, whose credential is revoked.
    cluster.run("scontrol", "update", f"jobid={job_id}", "StartTime=now+3")
    state = cluster.wait_for_state(job_id, {"COMPLETED", "FAILED"}, seconds=300)
    text = outputs(job.run_dir)
    assert state == "COMPLETED", text
    assert "): queued again" in text and f"resumed at step {stopped_at} of {STEPS}" in text
    assert losses(job.run_dir) == expected  # bit for bit: floats written by repr


def test_a_failing_run_is_not_requeued(
    cluster: SlurmCluster, config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared(config_path, "broken")
    broken = job.config.model_copy(update={"data": job.config.data.model_copy(update={"path": ["/nowhere.jsonl"]})})
    job_id = submit(cluster, PreparedJob(broken, job.run_dir, job.script), monkeypatch)
    assert cluster.wait_for_state(job_id, {"COMPLETED", "FAILED"}, seconds=120) == "FAILED"
    assert cluster.job(job_id)["Restarts"] == "0"
    assert "error: " in outputs(job.run_dir) and "/nowhere.jsonl" in outputs(job.run_dir)


def test_job_files_are_fixed_at_submission(config_path: Path) -> None:
    job = prepared(config_path, "fixed")
    assert job.config.run.dir == str(job.run_dir) and job.run_dir.is_absolute()
    assert str(job.config_path) in job.script and str(config_path) not in job.script
    assert sys.executable in job.script and os.fspath(job.run_dir) in job.script
