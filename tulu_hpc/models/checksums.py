"""Size and checksum of files, as manifests of checkpoints and records of conversions note them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

Entry = dict[str, Any]  # {"size": bytes, "xxh3": hex digest}
_BLOCK_BYTES = 1 << 20  # hashed while it is in the processor's cache


def file_entry(file: Path) -> Entry:
    """Size and xxh3-128 of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    buffer = bytearray(_BLOCK_BYTES)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return {"size": size, "xxh3": digest.hexdigest()}
