"""Peak memory of this process."""

from __future__ import annotations

from pathlib import Path

GIB = 2**30


def peaks(*, reset: bool = False) -> dict[str, float]:
    """GiB. On a GPU what torch's allocator gave out and what it reserved, since the last reset; else the largest
    resident set since the process began, which nothing can reset.

    Args:
        reset: begin anew (GPU only).
    """
    import torch

    if torch.cuda.is_available():
        found = {
            "memory/peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return found
    status = Path("/proc/self/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"memory/peak_rss_gib": int(kib) * 1024 / GIB}
