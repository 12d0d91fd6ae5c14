"""Finds and runs the benchmark that lies beside each kernel family (`kernels/<family>/bench.py`)."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def _kernels_folder() -> Path:
    import tulu_hpc

    return Path(tulu_hpc.__file__).parent / "kernels"


def families() -> list[str]:
    """Kernel families that have a benchmark."""
    return sorted(path.parent.name for path in _kernels_folder().glob("*/bench.py"))


def run(family: str, arguments: Sequence[str]) -> None:
    """Run one benchmark as a program with its own arguments.

    Raises:
        ValueError: there is no such family.
    """
    if family not in families():
        raise ValueError(f"no benchmark named {family!r}; there are: {', '.join(families()) or 'none'}")
    saved = sys.argv
    sys.argv = [f"tulu-hpc bench {family}", *arguments]
    try:
        runpy.run_module(f"tulu_hpc.kernels.{family}.bench", run_name="__main__")
    finally:
        sys.argv = saved
