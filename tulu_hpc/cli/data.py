"""data synthesize, mix, decontaminate and prefer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tulu_hpc.cli.common import ConfigPath, Overrides, PrintConfig, load_and_run
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
