"""The summary of soak runs keeps what earlier runs found."""

import json
from pathlib import Path

from tests.soak import write_summary


def test_a_run_replaces_its_own_entries_only(tmp_path: Path) -> None:
    file = tmp_path / "results" / "soak.json"
    write_summary(file, {"tests/a.py::one": {"cases": 3}, "tests/a.py::two": {"cases": 5}})
    write_summary(file, {"tests/a.py::one": {"cases": 60, "worst": 1e-6}})
    found = json.loads(file.read_text())
    assert {name: entry["cases"] for name, entry in found.items()} == {"tests/a.py::one": 60, "tests/a.py::two": 5}
    assert found["tests/a.py::one"]["worst"] == 1e-6 and "torch" in found["tests/a.py::one"]["versions"]
