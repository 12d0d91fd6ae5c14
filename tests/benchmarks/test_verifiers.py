"""The machinery of the verifier benchmark at a tiny size; it says nothing of speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_measures_every_kind(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/verifiers/throughput.py", "--verdicts", "8", "--repeats", "1"]
    command += ["--json", str(tmp_path / "out.json")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout.splitlines()[-1])
    assert results == json.loads((tmp_path / "out.json").read_text())
    labels = set(results["verifiers"])
    assert {"gsm8k", "json_schema", "ifeval, words", "math, number", "math, polynomial", "code, 3 tests"} <= labels
    for label, figures in results["verifiers"].items():
        assert figures["per_core"] > 0 and figures["per_second"] > 0
        # Right answers but where the prose alone decides otherwise (exact, f1) or holds a comma (ifeval).
        if label.startswith(("gsm8k", "math", "code", "json_schema", "flan", "format", "substring")):
            assert figures["mean_score"] == 1.0, label
