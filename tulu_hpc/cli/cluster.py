"""plan and launch: before a job is queued, and queueing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tulu_hpc.cli.common import ConfigPath, Overrides, PrintConfig, refuse_torchrun
from tulu_hpc.config.loader import dump_yaml
from tulu_hpc.config.verbs import load_training_config, training_verb

Verb = Annotated[str | None, typer.Option(help="sft, dpo, rm or rlvr; default: what the file says.")]


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="GPU type, e.g. h100, h200, a100; or GiB, e.g. 80.")] = "h100",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the whole run; default: run.gpus, else one replica.")
    ] = None,
    verb: Verb = None,
    print_config: PrintConfig = False,
) -> None:
    """Bytes per rank for weights, gradients, optimizer, activations and logits, and whether they fit."""
    loaded = load_training_config(config, overrides or (), verb)
    if print_config:
        typer.echo(dump_yaml(loaded), nl=False)
        return
    from tulu_hpc.planner import report

    text, fits = report.plan_text(loaded, gpu=gpu, gpus=gpus)
    typer.echo(text)
    if not fits:
        raise typer.Exit(1)


def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 0,
    processes_per_node: Annotated[int | None, typer.Option(min=1, help="Default: the GPUs of a node.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPU cores of a node's processes together.")] = None,
    verb: Verb = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    time: Annotated[str, typer.Option(help="Time limit, e.g. 24:00:00.")] = "24:00:00",
    save_seconds: Annotated[int, typer.Option(min=1, help="Save and queue again this long before the limit.")] = 600,
    job_name: Annotated[str | None, typer.Option()] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Whole nodes.")] = False,
    python: Annotated[str | None, typer.Option(help="Interpreter on the nodes; default: this one.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="Rendezvous address; default: first host.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the job; repeatable.")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="Shell line before the run; repeatable.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Further #SBATCH option; repeatable.")] = None,
    srun: Annotated[str, typer.Option(help="Further srun options, e.g. a container.")] = "",
    template: Annotated[Path | None, typer.Option(help="Batch template of your own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job, write and submit nothing.")] = False,
    print_config: PrintConfig = False,
) -> None:
    """Submit a training run to Slurm; it saves before its time limit and queues itself again until it is done."""
    verb = training_verb(config, verb)
    loaded = load_training_config(config, overrides or (), verb)
    if print_config:
        typer.echo(dump_yaml(loaded), nl=False)
        return
    from tulu_hpc.launch.job import prepare
    from tulu_hpc.launch.slurm import parse_environment

    options: dict[str, object] = {"python": python} if python else {}
    prepared = prepare(
        loaded,
        verb,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        template=template,
        cpus_per_task=cpus_per_task,
        partition=partition,
        account=account,
        time_limit=time,
        save_seconds=save_seconds,
        exclusive=exclusive,
        job_name=job_name or f"{loaded.run.name}-{verb}",
        master_addr=master_addr,
        environment=parse_environment(env or ()),
        setup=setup or (),
        sbatch_options=sbatch or (),
        srun_options=srun,
        **options,
    )
    if dry_run:
        typer.echo(prepared.script, nl=False)
        return
    refuse_torchrun()
    job_id = prepared.submit()
    typer.echo(f"submitted job {job_id}, run directory {prepared.run_dir}")
