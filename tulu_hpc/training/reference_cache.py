"""Reference log-probs on disk: a directory that may be made on one machine and used on another.

    {directory}/{fingerprint of the weights}/shard_000000_{hash of the file}.npy, shard_000001_..., ...

Nothing in it depends on a path, on the order of the data, on the layout or on the run: rows are found by the content of
their pair, and a shard carries the hash of its bytes in its name. There is no index, so directories made in different
places are joined by copying their shards together; where two shards have a row, the one whose name sorts last counts.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from tulu_hpc.training.pair_sums import Sums

ROW = np.dtype([("key", "S32"), ("chosen", "<f8"), ("rejected", "<f8")])  # the same bytes on any machine
_SHARD = re.compile(r"shard_(\d{6})_([0-9a-f]{32})\.npy")


class ReferenceCache:
    """Rows of one reference model on disk. Only the main process reads and writes.

    Attributes:
        rows: key of the item -> (chosen, rejected) sums; an answer without a partner has 0 for the second.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory / fingerprint
        self.rows: dict[str, Sums] = {}
        self._next = 0
        for file in sorted(self.directory.glob("shard_*.npy")):
            if match := _SHARD.fullmatch(file.name):
                self._next = max(self._next, int(match[1]) + 1)
                self._load(file, match[2])

    def _load(self, file: Path, wanted: str) -> None:
        content = file.read_bytes()
        if xxhash.xxh3_128_hexdigest(content) != wanted:
            print(f"reference log-probs: {file} is damaged; its rows are computed again", file=sys.stderr, flush=True)
            return
        table = np.load(io.BytesIO(content), allow_pickle=False)
        if table.dtype != ROW:
            raise ValueError(f"{file}: holds {table.dtype}, not reference log-probs")
        self.rows.update((key.decode(), (chosen, rejected)) for key, chosen, rejected in table.tolist())

    def append(self, rows: Mapping[str, Sums]) -> None:
        """Write rows as a new shard, in one atomic step: a kill leaves it whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, np.array([(key.encode(), *(*sums, 0.0)[:2]) for key, sums in rows.items()], ROW))
        content = buffer.getvalue()
        name = f"shard_{self._next:06d}_{xxhash.xxh3_128_hexdigest(content)}.npy"
        partial = self.directory / f".{name}.{os.getpid()}"
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(self.directory / name)
        self._next += 1
        self.rows.update(rows)
