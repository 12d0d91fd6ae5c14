"""Verdicts kept by the content that they were given for.

The key is a hash of the rule set, the record's verifiers and ground truths, the completion, the judge, and the source
of every verifier: a changed verifier finds nothing of what it said before. Verdicts that were lost, and those that a
clock ended, are not kept. A folder makes the cache outlive the process: each process appends to a file of its own, so
that many may share the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from tulu_hpc.verifiers.registry import Verdict


def source_hash(modules: Sequence[str]) -> str:
    """Hash of this package's source and of further modules'."""
    digest = hashlib.sha256()
    files = sorted(Path(__file__).parent.rglob("*.py"))
    for module in modules:
        found = importlib.util.find_spec(module)
        if found is not None and found.origin is not None and os.path.isfile(found.origin):
            files.append(Path(found.origin))
    for file in files:
        digest.update(file.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()


class VerdictCache:
    """The last `max_entries` verdicts, and all of a folder's."""

    def __init__(self, identity: Sequence[Any], folder: str | Path | None = None, max_entries: int = 200_000) -> None:
        """
        Args:
            identity: what decides a verdict beside record and completion; JSON values.
            folder: where verdicts are kept; None for this process only.
            max_entries: how many are held in memory; the oldest go first.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self._prefix = hashlib.sha256(json.dumps(list(identity)).encode()).digest()
        self._entries: OrderedDict[str, Verdict] = OrderedDict()
        self._max_entries = max_entries
        self._folder = Path(folder) if folder is not None else None
        self._file: TextIO | None = None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("verdicts-*.jsonl")):
                self._read(path)

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, record: Mapping[str, Any], completion: str) -> str | None:
        """The key of a verdict; None for a record that is no JSON, which is not cached."""
        try:
            body = json.dumps([dict(record), completion], sort_keys=True)
        except (TypeError, ValueError):
            return None
        return hashlib.sha256(self._prefix + body.encode()).hexdigest()

    def get(self, key: str) -> Verdict | None:
        verdict = self._entries.get(key)
        if verdict is not None:
            self._entries.move_to_end(key)
        return verdict

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict, unless a clock had a part in it."""
        if any(value for name, value in verdict.metrics.items() if name.rpartition("/")[2] == "timeout"):
            return
        self._remember(key, verdict)
        if self._folder is not None:
            if self._file is None:
                path = self._folder / f"verdicts-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
                self._file = path.open("w", encoding="utf-8")
            self._file.write(json.dumps([key, asdict(verdict)]) + "\n")

    def flush(self) -> None:
        """Bring what was kept to the file."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _remember(self, key: str, verdict: Verdict) -> None:
        self._entries[key] = verdict
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def _read(self, path: Path) -> None:
        """Lines that are cut off (a process was killed while it wrote) are skipped."""
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    key, fields = json.loads(line)
                    self._remember(key, Verdict(float(fields["score"]), fields["reason"], fields["metrics"]))
                except (ValueError, KeyError, TypeError):
                    continue
