"""The scaling benchmark: its line and deviations on known points, and the machinery at a tiny size.

Proves nothing about how our trainer scales: at these sizes the times are those of Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAINING = Path(__file__).parents[2] / "benchmarks" / "training"
SCRIPT = TRAINING / "scaling.py"


def fit(x: list[float], y: list[float]) -> dict[str, Any]:
    program = "import json, sys; from scaling import fit; print(json.dumps(fit(*json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([x, y])],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": f"{TRAINING}:{TRAINING.parents[1]}"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_line_and_the_deviations_from_it() -> None:
    # The least-squares line is y = 1 + 2 x: the residuals +1, -2, +1 add up to zero, and so do x times they.
    found = fit([1.0, 2.0, 3.0], [4.0, 3.0, 8.0])
    assert found["slope"] == pytest.approx(2.0) and found["constant"] == pytest.approx(1.0)
    assert found["deviation_percent"] == pytest.approx([100 / 3, -40.0, 100 / 7])
    assert found["max_deviation_percent"] == pytest.approx(40.0)


def test_every_point_is_measured(tmp_path: Path) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "out.svg"
    ranks = 2 if len(os.sched_getaffinity(0)) > 1 else 1
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--ranks", str(ranks), "--json", file, "--plot", picture],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(file.read_text())
    for name, points in (("layers", 3), ("tokens", 3), ("ranks", 1)):
        each = found[name]
        assert len(each["x"]) == len(each["seconds"]) == points
        assert all(len(repeats) == 2 and min(repeats) > 0 for repeats in each["all_seconds"])
    assert found["ranks"]["x"] == [ranks]
    assert found["ranks"]["tokens_per_second"] == [pytest.approx(128 * ranks / found["ranks"]["seconds"][0])]
    deviations = [found[name]["fit"]["max_deviation_percent"] for name in ("layers", "tokens")]
    deviations += [max(map(abs, found["ranks"][f"{name}_percent"])) for name in ("deviation", "communication")]
    assert [goal["value"] for goal in found["goals"]] == deviations
    assert all(goal["met"] == (goal["value"] <= 10) for goal in found["goals"])
    assert sum(line.startswith("|---:") for line in done.stdout.splitlines()) == 3
    assert picture.read_text().startswith("<svg") and "share of the largest size" in picture.read_text()


def test_more_ranks_than_cores_are_refused() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--ranks", "4096"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "every rank gets a core of its own" in done.stderr
