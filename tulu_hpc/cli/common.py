"""What all verbs share: arguments, loading a configuration, and errors as one clear line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from tulu_hpc.config.loader import ConfigError, dump_yaml, load_config
from tulu_hpc.stages.step_files import check_files

Config = TypeVar("Config", bound=BaseModel)

EXIT_BAD_INPUT = 2
TRACEBACK_VARIABLE = "TULU_HPC_TRACEBACK"

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of this verb.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Dotted keys, e.g. parallel.tensor=2.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")]


def load_and_run(
    path: Path,
    overrides: Sequence[str] | None,
    schema: type[Config],
    print_config: bool,
    stage: Callable[[], Callable[[Config], Any]],
    *,
    alone: bool = False,
) -> None:
    """Load the configuration, check where it writes, then import the stage (only now: it may need seconds) and run it.

    Args:
        alone: the verb is one process; several would write the same files at the same time.
    """
    config = load_config(path, overrides or (), schema)
    if print_config:
        typer.echo(dump_yaml(config), nl=False)
        return
    if alone:
        refuse_torchrun()
    check_files(config)
    stage()(config)


def refuse_torchrun() -> None:
    """For verbs that are one process.

    Raises:
        ConfigError: this is one of several processes.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError(f"this verb is a single process, not {world}; run it without torchrun")


def rank_prefix() -> str:
    """`[rank 3] ` under torchrun with several processes, else nothing."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return f"[rank {rank}] " if rank is not None and world != "1" else ""


def report_error(error: Exception) -> None:
    """Print `error: ...`, each line with the rank under torchrun; the traceback only when asked for."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    for line in lines:
        print(f"{rank_prefix()}error: {line}", file=sys.stderr, flush=True)


def wants_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")
