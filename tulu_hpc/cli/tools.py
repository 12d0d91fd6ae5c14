"""doctor and bench."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor() -> None:
    """What this machine has: versions, devices, kernel backends, engines, and how to get what is missing."""
    from tulu_hpc.diagnostics import doctor as diagnosis

    typer.echo(diagnosis.report())


def bench(
    context: typer.Context,
    family: Annotated[str | None, typer.Argument(help="Kernel family, or kernels for all; none: list them.")] = None,
) -> None:
    """Benchmark of a kernel family; further arguments go to it (--help shows them)."""
    from tulu_hpc.diagnostics import benchmarks

    if family is None:
        typer.echo("\n".join(benchmarks.families()))
        return
    benchmarks.run(family, context.args)
