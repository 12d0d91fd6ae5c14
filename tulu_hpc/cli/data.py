"""data synthesize, mix, decontaminate, prefer, preview and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tulu_hpc.cli.common import ConfigPath, Overrides, PrintConfig, load_and_run, refuse_torchrun
from tulu_hpc.config.schema import DecontaminateConfig, MixConfig, PreferConfig, SyntheticConfig


def synthesize(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Make the quickstart's data: word problems and instructions in the public schemas, with planted leaks."""

    def stage() -> Callable[[SyntheticConfig], Any]:
        from tulu_hpc.stages import synthesize

        return synthesize.run

    load_and_run(config, overrides, SyntheticConfig, print_config, stage, alone=True)


def mix(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Mix sources by counts or fractions, with statistics per source."""

    def stage() -> Callable[[MixConfig], Any]:
        from tulu_hpc.stages import mix

        return mix.run

    load_and_run(config, overrides, MixConfig, print_config, stage, alone=True)


def decontaminate(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Remove training rows that share n-grams with evaluations, with a report of the matched spans."""

    def stage() -> Callable[[DecontaminateConfig], Any]:
        from tulu_hpc.stages import decontaminate

        return decontaminate.run

    load_and_run(config, overrides, DecontaminateConfig, print_config, stage, alone=True)


def prefer(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Preference pairs: sample from a model, verify, keep the best as chosen and a worse one as rejected."""

    def stage() -> Callable[[PreferConfig], Any]:
        from tulu_hpc.stages import prefer

        return prefer.run

    load_and_run(config, overrides, PreferConfig, print_config, stage)


def preview(
    config: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Samples shown: longest, shortest, one per source, then random ones.")] = 24,
    output: Annotated[Path | None, typer.Option(help="HTML file; by default masks.html in the run directory.")] = None,
    verb: Annotated[str | None, typer.Option(help="sft, dpo or rm; by default the file's own.")] = None,
) -> None:
    """A page that shows which tokens a training file would train, before it trains."""
    from tulu_hpc.config.loader import ConfigError
    from tulu_hpc.config.schema import RlvrConfig
    from tulu_hpc.config.verbs import load_training_config
    from tulu_hpc.stages import training_data

    refuse_torchrun()
    loaded = load_training_config(config, overrides or (), verb)
    if isinstance(loaded, RlvrConfig):
        raise ConfigError(f"{config}: rlvr trains on its own samples, there is nothing to show before it runs")
    typer.echo(training_data.preview(loaded, rows=rows, output=output))


def samples(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")],
) -> None:
    """Prove from a run's log that no sample was left out or seen twice."""
    from tulu_hpc.data import sample_log

    typer.echo(sample_log.audit(run / "samples"))
