"""The benchmark of weight sync at a tiny size: the plugin's receiver holds the sender's weights, at both layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import vllm_server as real

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rollout" / "weight_sync.py"


@real.needs_vllm
@pytest.mark.timeout(300)
def test_all_weights_arrive(tmp_path: Path) -> None:
    """The benchmark itself compares the sum of the received weights with that of the sent ones."""
    file = tmp_path / "out.json"
    size = ["--layers", "2", "--hidden", "256", "--vocab", "1001", "--bucket-mib", "1", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *size, "--python", real.PYTHON, "--json", file],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    layouts = json.loads(file.read_text())["layouts"]
    assert list(layouts) == ["tp1", "tp2 pp2"]
    for layout, found in layouts.items():
        assert found["ratio"] > 0 and len(found["memory"]) == (1 if layout == "tp1" else 4)
