"""The machinery of the conversion benchmark at a tiny size; it says nothing of speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    sizes = ["--layers", "1", "--hidden", "256", "--vocab", "300", "--repeats", "1", "--workers", "2"]
    command = [sys.executable, "benchmarks/data/convert.py", *sizes, "--cache", "warm"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout.splitlines()[-1])
    assert results == json.loads((tmp_path / "out.json").read_text())
    assert {each.name for each in tmp_path.iterdir()} == {"out.json"}
    assert set(results["verbs"]) == {"import", "export", "verify"} and results["tensors"] == 12
    for each in results["verbs"].values():
        assert each["gb_per_second"] > 0 and each["cp_gb_per_second"] > 0
        assert 0.1 < each["peak_anonymous_gb"] < each["peak_resident_gb"] < 2  # torch alone has 0.14
