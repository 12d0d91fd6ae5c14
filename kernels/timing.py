"""What the kernel benchmarks share: timing, a table, and a JSON line."""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def best_milliseconds(function: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Best of `repeats` after one warm-up: process CPU time over threads on CPU, event time on CUDA."""
    function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            before = time.process_time()
            function()
            times.append(1e3 * (time.process_time() - before) / torch.get_num_threads())
    return min(times)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.2f}"
    return str(value)


def report(name: str, lines: list[dict[str, Any]], path: str | None) -> None:
    """Prints `lines` as a table and then everything as one JSON object, which is also written to `path` if given."""
    cells = [list(lines[0]), *([_cell(value) for value in line.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    result = {
        "benchmark": name,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lines": lines,
    }
    text = json.dumps(result)
    if path:
        Path(path).write_text(text + "\n")
    print(text)
