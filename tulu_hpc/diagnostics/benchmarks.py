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
    """Every family's benchmark in a process of its own, one after the other; figures, tables and plots in files.

    Args:
        arguments: `--output FOLDER` (default: benchmarks) for kernels.json, kernels.md and plots/; all others go to
            every family's benchmark.

    Raises:
        ValueError: an unknown argument.
        RuntimeError: a benchmark failed (after the others have run and what they found is written).
    """
    import argparse

    from tulu_hpc.kernels import timing

    # No abbreviations: what follows would be cut out wrongly.
    own = argparse.ArgumentParser(prog=f"tulu-hpc bench {ALL}", exit_on_error=False, allow_abbrev=False)
    own.add_argument("--output", type=Path, default=Path("benchmarks"))
    options, passed_on = own.parse_known_args(list(arguments))
    _, unknown = timing.parser(None).parse_known_args(passed_on)
    if unknown or {"--json", "--markdown"} & {argument.split("=")[0] for argument in passed_on}:
        raise ValueError(
            f"bench {ALL}: unknown arguments {' '.join(unknown or passed_on)}; "
            "there are --quick, --rehearse, --device, --skip, --only and --output FOLDER"
        )
    results: dict[str, Any] = {}
    failed: list[str] = []
    for family in families():
        print(f"== {family}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            command = [sys.executable, "-m", f"tulu_hpc.kernels.{family}.bench", "--json", str(figures), *passed_on]
            if subprocess.run(command).returncode:
                failed.append(family)
            if figures.exists():
                results[family] = json.loads(figures.read_text())
    write(results, options.output)
    print(f"{options.output / 'kernels.md'}, {options.output / 'kernels.json'}, {options.output / 'plots'}")
    if failed:
        raise RuntimeError(f"the benchmarks of {', '.join(failed)} failed (their output is above)")


def write(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """kernels.json, kernels.md and plots/*.svg of the results of all families."""
    from tulu_hpc.diagnostics.benchmark_plots import plots
    from tulu_hpc.kernels.bench_report import markdown

    (folder / "plots").mkdir(parents=True, exist_ok=True)
    parts = ["# Kernel benchmarks", ""]
    for family, result in results.items():
        parts.append(markdown(result))
        for name, svg in plots(family, result["lines"]).items():
            (folder / "plots" / name).write_text(svg + "\n")
            parts += [f"![{family}: share of the roofline](plots/{name})", ""]
    (folder / "kernels.md").write_text("\n".join(parts))
    (folder / "kernels.json").write_text(json.dumps(results) + "\n")
