"""The peer benchmarks at tiny sizes: they run TRL's trainers and ours, and both compute the same losses.

Proves that the two sides train on the same tokens with the same loss, step by step. Proves nothing about speed: at
these sizes the times are those of Python.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra `peers`)")


def benchmark(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark in --quick; its JSON, which must be the same in the file and on the last line."""
    file = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, PEERS / script, "--quick", "--threads", "1", "--json", file, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(file.read_text())
    return last


@needs_trl
@pytest.mark.parametrize(
    ("script", "case", "settings"),
    [
        ("trl_sft.py", "varied", ["trl-batch8"]),
        ("trl_dpo.py", "prompt = 2 responses", ["trl-batch8"]),
    ],
)
def test_same_losses(script: str, case: str, settings: list[str], tmp_path: Path) -> None:
    found = benchmark(script, tmp_path, "--steps", "2", "--case", case, "--settings", *settings)
    assert set(found["ratio"]) == {case}
    ours, theirs = found["cases"][case]["ours"], found["cases"][case]["theirs"]
    for setting in settings:
        assert theirs[setting]["loss_difference"] < 1e-4
        assert len(theirs[setting]["losses"]) == len(ours["losses"]) == 3
        assert theirs[setting]["ratio"] > 0
    assert len(set(ours["losses"])) == 3, "the losses do not move: nothing was trained"
    assert ours["rows_per_step"] < theirs[settings[0]]["rows_per_step"]
    assert found["versions"]["trl"] != "not installed"


def test_unknown_case_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, PEERS / "trl_sft.py", "--quick", "--case", "none"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "no case 'none'" in done.stderr
    assert "varied" in done.stderr


def test_a_worker_that_fails_is_reported_with_its_log(tmp_path: Path) -> None:
    # The driver must not hang on a process that is gone.
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from common import Spec\nfrom turns import Worker, take_turns\n"
        "spec = Spec('', '', '', 1, 1, 1, 0.0, 1)\n"
        "take_turns([Worker('broken', Path(sys.argv[2]), 'x', spec, Path(sys.argv[3]))], 1)\n"
    )
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('what went wrong')\n")
    done = subprocess.run(
        [sys.executable, "-c", program, str(PEERS), str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "RuntimeError: worker broken ended with code 1" in done.stderr
    assert "what went wrong" in done.stderr
