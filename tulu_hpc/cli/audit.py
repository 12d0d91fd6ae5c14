"""audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tulu_hpc.cli.common import ConfigPath, Overrides

EXIT_DOES_NOT_HOLD = 1


def audit(
    config: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Samples of the data.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=8, help="Samples are cut to this length.")] = 512,
    layers: Annotated[int | None, typer.Option(min=1, help="Only the first layers; empty: all.")] = None,
    dtype: Annotated[str, typer.Option(help="Of our side: float32, bfloat16, or `config`.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="Directory; by default `audit` in the run directory.")] = None,
    verb: Annotated[str | None, typer.Option(help="sft, dpo, rm or rlvr; by default the file's own.")] = None,
) -> None:
    """Prove that model, layout and data of a training file compute what Hugging Face computes in one process.

    Start it as the training itself, with torchrun at the layout's number of processes. Exit code 0: it holds, 1: it
    does not.
    """
    from tulu_hpc.config.loader import ConfigError
    from tulu_hpc.config.verbs import load_training_config
    from tulu_hpc.stages import audit as stage

    loaded = load_training_config(config, overrides or (), verb)
    chosen = loaded.model.dtype if dtype == "config" else dtype
    if chosen not in stage.TOLERANCES:
        raise ConfigError(f"--dtype {dtype!r}: expected float32, bfloat16 or config")
    target = output or Path(loaded.run.dir or loaded.run.root) / "audit"
    certificate = stage.run(loaded, output=target, rows=rows, max_tokens=max_tokens, layers=layers, dtype=chosen)
    if is_main():
        for check in certificate.checks:
            state = "holds" if check.holds else "FAILS"
            typer.echo(
                f"audit: {check.name:<9} {state}  worst {check.worst.value:.3g} of {check.tolerance:.3g} "
                f"at {check.worst.place} ({len(check.differences)} compared)"
            )
        typer.echo(f"audit: {certificate.verdict()}\naudit: {target / 'audit.html'}")
    if not certificate.holds:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def is_main() -> bool:
    """Whether this is the process that talks to the user."""
    import os

    return os.environ.get("RANK", "0") == "0"
