"""The peer benchmarks at tiny sizes: they run TRL's trainers and ours, and both compute the same losses.

Proves that the two sides, and ours without a part of it, train on the same tokens with the same loss, step by step.
Proves nothing about speed: at these sizes the times are those of Python.
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
    ("script", "case", "parts"),
    [
        ("trl_sft.py", "varied", ["both"]),
        ("trl_dpo.py", "prompt = 2 responses", ["cached reference", "first three"]),
        ("trl_grpo.py", "prompt = response", ["all three"]),
    ],
)
def test_same_losses(script: str, case: str, parts: list[str], tmp_path: Path) -> None:
    arguments = ["--steps", "1", "--case", case, "--settings", "trl-batch8", "--without", *parts]
    found = benchmark(script, tmp_path, *arguments)
    assert set(found["ratio"]) == {case}
    ours, theirs = found["cases"][case]["ours"], found["cases"][case]["theirs"]["trl-batch8"]
    without = found["cases"][case]["without"]
    assert list(without) == parts == list(found["parts"][case])
    for other in (theirs, *without.values()):
        assert other["loss_difference"] < 1e-4
        assert len(other["losses"]) == len(ours["losses"]) == 2
        assert other["ratio"] > 0 and other["memory_ratio"] > 0
    assert len(set(ours["losses"])) == 2, "the losses do not move: nothing was trained"
    assert ours["rows_per_step"] < theirs["rows_per_step"]
    if script == "trl_grpo.py":  # its batches are shuffled within a step, so how much they are padded varies
        assert theirs["loss_difference"] < 1e-5
        check_goals(found["goals"][case], theirs, ours)
        return
    # TRL reads the rectangle; ours drops the last token of each sequence, which nothing reads.
    sequences = {"trl_sft.py": 16, "trl_dpo.py": 16}[script]
    assert without[parts[-1]]["rows_per_step"] == theirs["rows_per_step"] - sequences
    assert found["versions"]["trl"] != "not installed"
    check_goals(found["goals"][case], theirs, ours)


def check_goals(goals: list[dict[str, Any]], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    rate, memory = goals
    assert rate["value"] == theirs["ratio"] and rate["met"] == (rate["value"] >= rate["goal"])
    assert memory["value"] == pytest.approx(ours["peak_rss_mib"] / theirs["peak_rss_mib"])
    assert memory["met"] == (memory["value"] <= 0.6)


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


def test_contestants_that_do_not_do_the_same_work_are_refused() -> None:
    # Without this a ratio could be reported of two trainers that compute different things.
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from report import Setting, compare\nfrom turns import Outcome\n"
        "def outcome(loss, tokens):\n"
        "    step = dict(seconds=1.0, cpu_seconds=1.0, loss=loss, tokens=tokens, rows=9)\n"
        "    return Outcome('it', {}, [step], 1)\n"
        "for loss, tokens in ((1.0, 5), (1.001, 4), (float('nan'), 4)):\n"
        "    try:\n"
        "        compare(outcome(1.0, 4), outcome(loss, tokens), Setting('other', {}, ''), 0, 1)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(PEERS)], capture_output=True, text=True, timeout=60)
    tokens, loss, nan = done.stdout.splitlines()
    assert "tokens per step differ" in tokens and "other" in tokens
    assert "losses differ by 1.0e-03" in loss
    assert "losses differ by nan" in nan
