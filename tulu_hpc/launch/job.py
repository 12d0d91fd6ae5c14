"""From a training configuration to a job: what is fixed at submission, what would fail only after hours in a queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tulu_hpc.config.loader import dump_yaml
from tulu_hpc.config.run_directory import new_run_path
from tulu_hpc.config.verbs import TrainingConfig
from tulu_hpc.launch.slurm import LaunchError, SlurmJob, render, submit

SUBMITTED_CONFIG = "config.submitted.yaml"


@dataclass(frozen=True)
class PreparedJob:
    """A rendered job, not yet written anywhere."""

    config: TrainingConfig
    run_dir: Path
    script: str

    @property
    def config_path(self) -> Path:
        return self.run_dir / SUBMITTED_CONFIG

    @property
    def script_path(self) -> Path:
        return self.run_dir / "train.sbatch"

    def submit(self) -> str:
        """Write the frozen configuration and the script into the run directory and submit; returns the job id."""
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)  # Slurm does not make the directory of its log
        self.config_path.write_text(dump_yaml(self.config), encoding="utf-8")
        return submit(self.script, self.script_path)


def prepare(
    config: TrainingConfig,
    verb: str,
    *,
    nodes: int,
    gpus_per_node: int,
    processes_per_node: int | None = None,
    template: Path | None = None,
    **options: Any,
) -> PreparedJob:
    """Fix the run directory and the configuration, check the layout, render the script.

    The job reads a copy of the configuration made now: editing the YAML file while the job waits, or between two
    requeues, changes nothing. `options` are fields of `SlurmJob`.

    Raises:
        LaunchError: the layout does not fit the number of processes, or there are none.
    """
    processes = processes_per_node if processes_per_node is not None else gpus_per_node
    if processes < 1:
        raise LaunchError("give --gpus-per-node, or --processes-per-node for nodes without GPUs")
    world = nodes * processes
    parallel = config.parallel
    if world % parallel.model_parallel:
        raise LaunchError(
            f"{nodes} nodes x {processes} processes = {world} cannot be divided into replicas of "
            f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = "
            f"{parallel.model_parallel}"
        )
    run_dir = Path(config.run.dir or new_run_path(config.run.root, verb)).resolve()
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})
    job = SlurmJob(
        arguments=[verb, str(run_dir / SUBMITTED_CONFIG)],
        run_dir=run_dir,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes,
        **options,
    )
    return PreparedJob(config, run_dir, render(job, template))
