"""rollout serve: rollout servers beside the trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tulu_hpc.cli.common import ConfigPath, Overrides, PrintConfig, load_and_run
from tulu_hpc.config.schema import RlvrConfig


def serve(
    config: ConfigPath,
    overrides: Overrides = None,
    log: Annotated[Path, typer.Option(help="File for the output of vLLM.")] = Path("rollout-server.log"),
    print_config: PrintConfig = False,
) -> None:
    """A vLLM server for an rlvr configuration, in its own environment, until it is stopped; ends with this process."""

    def stage() -> Callable[[RlvrConfig], Any]:
        from tulu_hpc.stages import rollout_server

        return partial(rollout_server.run, log=log)

    load_and_run(config, overrides, RlvrConfig, print_config, stage, alone=True)
