"""A written file is the old one or the whole new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tulu_hpc.telemetry.files import write_atomically


def test_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "report.html"
    for text in ("first \u21b5", "second"):
        write_atomically(file, text)
        assert file.read_text(encoding="utf-8") == text and list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "half of a pair: \ud800")
    assert file.read_text() == "old"
