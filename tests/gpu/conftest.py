"""Skips without a GPU; with `--summary FILE` writes what passed on which GPU and versions."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.moved import REHEARSAL, gpu_name

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or REHEARSAL:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    path = terminalreporter.config.getoption("--gpu-summary", None)
    if not path or not (torch.cuda.is_available() or REHEARSAL):
        return
    outcomes = {
        name: Counter(Path(report.nodeid.split("::")[0]).stem for report in terminalreporter.stats.get(name, []))
        for name in ("passed", "failed", "skipped")
    }
    summary = {
        "gpu": gpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "cuda": torch.version.cuda,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "tulu_hpc")},
        **outcomes,
        "failures": [report.nodeid for report in terminalreporter.stats.get("failed", [])],
    }
    Path(path).write_text(json.dumps(summary, indent=1) + "\n")
