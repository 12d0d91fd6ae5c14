"""The rooms of tulu_hpc import downwards only, also inside functions; the top of the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tulu_hpc"

# Rooms of one level may not import each other; a level may import every level below it.
LEVELS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"stages"},
    {"training", "curation", "evaluation", "planner", "launch", "diagnostics"},
    {"rollout", "objectives"},
    {"models"},
    {"parallel"},
    {"data", "verifiers"},
    {"config", "telemetry"},
]
ISOLATED = {"kernels", "verifiers"}  # import no other room
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
KERNEL_USERS_FROM = LEVEL["data"]  # data and above may import kernels


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_modules(tree: ast.AST, path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of tulu_hpc in a file, at any depth, relative ones and string names too."""
    package = ("tulu_hpc", *path.relative_to(PACKAGE).parent.parts)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__", "run_module") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return [(line, name) for line, name in found if name.split(".")[0] == "tulu_hpc"]


def violation(room: str, target: str) -> str | None:
    """Why `room` may not import `target`, or None."""
    if room == target:
        return None
    if room in ISOLATED:
        return f"{room} imports no other room"
    if room not in LEVEL:
        return f"{room} is not a room of the plan"
    if target == "kernels":
        return None if LEVEL[room] <= KERNEL_USERS_FROM else f"{room} is below data and may not import kernels"
    if target not in LEVEL:
        return f"{target} is not a room of the plan"
    return None if LEVEL[room] < LEVEL[target] else f"{room} may not import {target} (not below it)"


def check(source: str, path: Path) -> list[str]:
    problems = []
    for line, module in imported_modules(ast.parse(source), path):
        parts = module.split(".")
        if len(parts) < 2 or parts[1] == "__version__":
            continue
        reason = violation(room_of(path), parts[1])
        if reason:
            problems.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {module}: {reason}")
    return problems


def sources() -> list[Path]:
    # The link tulu_hpc/kernels is followed by hand: rglob does not follow links on every Python.
    files = [path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts]
    return files + list((PACKAGE / "kernels").rglob("*.py"))


def test_rooms_import_downwards() -> None:
    files = sources()
    assert len({room_of(path) for path in files}) > 10  # the walk sees the house, kernels included
    assert "kernels" in {room_of(path) for path in files}
    problems = [problem for path in files for problem in check(path.read_text(encoding="utf-8"), path)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("data", "from tulu_hpc.models import build"),
        ("data", "def f():\n    import tulu_hpc.parallel.layout"),
        ("training", "from tulu_hpc.evaluation.tasks import EvalTask"),
        ("rollout", "from tulu_hpc import objectives"),
        ("objectives", "from ..rollout import engine"),
        ("kernels", "from tulu_hpc.config import schema"),
        ("verifiers", "from tulu_hpc.config import schema"),
        ("config", "from tulu_hpc.kernels import linear_logprob"),
        ("models", "import importlib\nimportlib.import_module('tulu_hpc.stages.sft')"),
        ("kitchen", "from tulu_hpc.config import schema"),
    ],
)
def test_the_check_sees(room: str, source: str) -> None:
    assert check(source, PACKAGE / room / "module.py")


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("stages", "from tulu_hpc.training import trainer"),
        ("cli", "def f():\n    from tulu_hpc.stages import sft"),
        ("data", "from tulu_hpc.kernels import packed_attention"),
        ("data", "from . import packing"),
        ("config", "from tulu_hpc import __version__"),
    ],
)
def test_the_check_allows(room: str, source: str) -> None:
    assert not check(source, PACKAGE / room / "module.py")


@pytest.mark.parametrize(
    "module", ["tulu_hpc", "tulu_hpc.cli.main", "tulu_hpc.config.loader", "tulu_hpc.config.run_directory"]
)
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module}; heavy = {{'torch', 'numpy', 'transformers', 'megatron', 'tensorboard', 'matplotlib'}};"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)
