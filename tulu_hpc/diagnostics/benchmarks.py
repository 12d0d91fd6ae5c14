"""Finds and runs the benchmarks that lie beside the kernel families (`kernels/<family>/bench.py`)."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ALL = "kernels"


def _kernels_folder() -> Path:
    import tulu_hpc

    return Path(tulu_hpc.__file__).parent / "kernels"


def families() -> list[str]:
    """Kernel families that have a benchmark."""
    return sorted(path.parent.name for path in _kernels_folder().glob("*/bench.py"))


def run(family: str, arguments: Sequence[str]) -> None:
    """Run one benchmark as a program with its own arguments, or `kernels`: all of them, see `run_all`.

    Raises:
        ValueError: there is no such family.
        RuntimeError: one of all benchmarks failed.
    """
    if family == ALL:
        return run_all(arguments)
    if family not in families():
        raise ValueError(f"no benchmark named {family!r}; there are: {', '.join([*families(), ALL])}")
    saved = sys.argv
    sys.argv = [f"tulu-hpc bench {family}", *arguments]
    try:
        runpy.run_module(f"tulu_hpc.kernels.{family}.bench", run_name="__main__")
    finally:
        sys.argv = saved


def run_all(arguments: Sequence[str]) -> None:
    """Every family's benchmark in a process of its own, one after the other; tables and figures in two files.

    Args:
        arguments: `--quick` for small shapes, `--output FOLDER` (default: benchmarks) for kernels.json and kernels.md.

    Raises:
        ValueError: an unknown argument.
        RuntimeError: a benchmark failed; the others are not run.
    """
    import argparse

    parser = argparse.ArgumentParser(prog=f"tulu-hpc bench {ALL}", exit_on_error=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(f"bench {ALL}: unknown arguments {' '.join(unknown)}; there are --quick and --output FOLDER")
    results: dict[str, Any] = {}
    for family in families():
        print(f"== {family}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            command = [sys.executable, "-m", f"tulu_hpc.kernels.{family}.bench", "--json", str(figures)]
            if subprocess.run([*command, *(["--quick"] if options.quick else [])]).returncode:
                raise RuntimeError(f"the benchmark of {family} failed (its output is above)")
            results[family] = json.loads(figures.read_text())
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "kernels.json").write_text(json.dumps(results) + "\n")
    (options.output / "kernels.md").write_text(markdown(results))
    print(f"{options.output / 'kernels.md'}, {options.output / 'kernels.json'}")


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A section with a table for each family, in the order of its benchmark's lines."""
    parts = ["# Kernel benchmarks", ""]
    for family, result in results.items():
        setting = {key: value for key, value in result.items() if isinstance(value, str | int | float)}
        parts += [f"## {family}", "", ", ".join(f"{key} {value}" for key, value in setting.items()), ""]
        columns = list(dict.fromkeys(key for line in result["lines"] for key in line))
        parts += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        parts += [f"| {' | '.join(_cell(line.get(key)) for key in columns)} |" for line in result["lines"]]
        parts.append("")
    return "\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
