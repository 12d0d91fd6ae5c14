"""convert initialise, import, export and verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tulu_hpc.cli.common import ConfigPath, Overrides, PrintConfig, load_and_run, refuse_torchrun
from tulu_hpc.config.schema import InitialiseConfig

Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Of the written weights; default: the source's, or the run's model.dtype."),
]
Workers = Annotated[int, typer.Option("--workers", help="Threads; each holds a few MiB.")]


def initialise(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Train a tokenizer and write a random Llama as a Hugging Face directory."""

    def stage() -> Callable[[InitialiseConfig], Any]:
        from tulu_hpc.stages import initialise

        return initialise.run

    load_and_run(config, overrides, InitialiseConfig, print_config, stage, alone=True)


def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Directory with safetensors and config.json.")],
    target: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="Must not exist.")],
    dtype: Dtype = None,
    max_shard_gb: Annotated[float, typer.Option("--max-shard-gb", help="Largest file.")] = 2.0,
    workers: Workers = 4,
) -> None:
    """Write a Hugging Face model as a checkpoint that training starts from at any layout (model.path)."""
    refuse_torchrun()
    from tulu_hpc.stages import convert

    convert.import_model(source, target, dtype=dtype, max_shard_gb=max_shard_gb, workers=workers)


def export(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_DIR", help="A run, its checkpoints/step_N, or an imported checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Must not exist.")],
    dtype: Dtype = None,
    max_shard_gb: Annotated[float, typer.Option("--max-shard-gb", help="Largest file.")] = 5.0,
    workers: Workers = 4,
) -> None:
    """Write a checkpoint as a Hugging Face model."""
    refuse_torchrun()
    from tulu_hpc.stages import convert

    convert.export_model(source, target, dtype=dtype, max_shard_gb=max_shard_gb, workers=workers)


def verify(
    left: Annotated[Path, typer.Argument(metavar="A", help="A Hugging Face directory, a run or a checkpoint.")],
    right: Annotated[Path, typer.Argument(metavar="B", help="Another one, of any kind.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option("--dtype", help="Compare the numbers rounded to it.")
    ] = None,
    workers: Workers = 4,
) -> None:
    """Compare two models tensor by tensor: shape, dtype, checksum; the first that differs is named, exit code 2."""
    refuse_torchrun()
    from tulu_hpc.stages import convert

    convert.verify_models(left, right, dtype=dtype, workers=workers)
