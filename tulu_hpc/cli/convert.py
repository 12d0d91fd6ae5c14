"""convert initialise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tulu_hpc.cli.common import ConfigPath, Overrides, PrintConfig, load_and_run
from tulu_hpc.config.schema import InitialiseConfig


def initialise(config: ConfigPath, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Train a tokenizer and write a random Llama as a Hugging Face directory."""

    def stage() -> Callable[[InitialiseConfig], Any]:
        from tulu_hpc.stages import initialise

        return initialise.run

    load_and_run(config, overrides, InitialiseConfig, print_config, stage, alone=True)
