"""Summary of the soak tests: one entry per test that passed, with its date, versions and figures."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_summary(path: Path, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the figures of this run in their places; tests that did not run keep their old entries."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "tulu_hpc")}
    for test, each in figures.items():
        known[test] = {"date": time.strftime("%Y-%m-%d"), "versions": versions, **each}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
