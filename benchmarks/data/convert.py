"""`tulu-hpc convert` beside `cp` on the same files: speed, and the anonymous memory of all its threads together.

    python benchmarks/data/convert.py                       # a 9.1 GB Llama in bf16; needs 28 GB below --folder
    python benchmarks/data/convert.py --layers 1 --hidden 512   # seconds: checks the machinery, not the speed

For each verb: `cp` of the source directory, then the verb, `--repeats` times in turn. Before each the files it reads
are dropped from the page cache (`--cache cold`) or read once (`warm`). Seconds of a verb are its own report, with its
files synced to disk and without the start of Python; `process` is the whole process. `cp` is also timed with its files
synced. Speed is the size of the model over the seconds, for verify too, though it reads two models.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.companions import write_config
from tulu_hpc.models.names import hf_shapes
from tulu_hpc.models.safetensors_files import plan_shards, shard_files, shard_header, write_shard_index

SAMPLE_SECONDS = 0.01
GOAL_RATIO, GOAL_ANONYMOUS_GB = 0.5, 1.5


def write_random_llama(path: Path, layers: int, vocab: int, hidden: int = 4096) -> None:
    """Llama-3.1-8B's shapes with fewer layers; random bf16 numbers of size 2^-7 to 2, block by block."""
    architecture = Architecture(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    shapes, generator = hf_shapes(architecture), np.random.default_rng(0)
    shards = plan_shards(shapes, 2, 1e9)
    path.mkdir()
    for file, names in zip(shard_files(shards), shards, strict=True):
        with (path / file).open("wb") as stream:
            stream.write(shard_header(names, shapes, torch.bfloat16))
            left = sum(int(torch.Size(shapes[name]).numel()) for name in names)
            while left:
                block = generator.integers(0, 1 << 16, min(left, 1 << 22), dtype=np.uint16)
                stream.write(((block & 0x83FF) | 0x3C00).data)
                left -= len(block)
    write_shard_index(path, shards, shapes, torch.bfloat16)
    write_config(path, architecture, torch.bfloat16)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def each_file(path: Path, act: Callable[[int], object]) -> None:
    for file in sorted(path.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                act(descriptor)
            finally:
                os.close(descriptor)


def prepare(paths: list[Path], cache: str) -> None:
    """Everything written before is on disk; what is about to be read is in the page cache, or not."""
    os.sync()
    for path in paths:
        if cache == "cold":
            each_file(path, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))
        else:
            each_file(path, read_through)


def read_through(descriptor: int) -> None:
    buffer = bytearray(1 << 20)
    while os.readv(descriptor, [buffer]):
        pass


def copy(source: Path, target: Path, cache: str) -> dict[str, float]:
    prepare([source], cache)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - started
    each_file(target, os.fsync)
    synced = time.perf_counter() - started
    shutil.rmtree(target)
    return {"seconds": seconds, "synced_seconds": synced}


class Sampler(threading.Thread):
    """Largest anonymous and whole resident memory of a process, by /proc; the sums over its threads, as they share it.

    The verbs start no processes of their own; if that changes, the sampler says so.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._end = pid, threading.Event()
        self.anonymous = self.resident = self.children = 0

    def run(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            try:
                text = Path(f"/proc/{self._pid}/status").read_text()
                children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
            except (FileNotFoundError, ProcessLookupError):
                return
            found = dict(re.findall(r"^(RssAnon|VmRSS):\s+(\d+) kB", text, re.MULTILINE))
            self.anonymous = max(self.anonymous, int(found.get("RssAnon", 0)) * 1024)
            self.resident = max(self.resident, int(found.get("VmRSS", 0)) * 1024)
            self.children = max(self.children, len(children))

    def stop(self) -> None:
        self._end.set()
        self.join()


def convert(arguments: list[str], reads: list[Path], cache: str) -> dict[str, float]:
    prepare(reads, cache)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tulu_hpc", "convert", *arguments], stdout=subprocess.PIPE, text=True
    )
    sampler = Sampler(process.pid)
    sampler.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    sampler.stop()
    if process.returncode:
        raise SystemExit(f"convert {' '.join(arguments)}: exit code {process.returncode}")
    if sampler.children:
        raise SystemExit(f"convert {arguments[0]} starts processes of its own, which are not measured here")
    (own,) = re.findall(r" in ([\d.]+) s", output.strip().splitlines()[-1])
    return {
        "seconds": float(own),
        "process_seconds": seconds,
        "peak_anonymous_bytes": sampler.anonymous,
        "peak_resident_bytes": sampler.resident,
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    source, imported, exported = folder / "hf", folder / "checkpoint", folder / "back"
    write_random_llama(source, options.layers, options.vocab, options.hidden)
    size = size_of(source)
    common = ["--workers", str(options.workers)]
    verbs: dict[str, tuple[list[str], list[Path], Path | None]] = {
        "import": (["import", str(source), str(imported), *common], [source], imported),
        "export": (["export", str(imported), str(exported), *common], [imported], exported),
        "verify": (["verify", str(source), str(imported), *common], [source, imported], None),
    }
    results: dict[str, Any] = {}
    for verb, (arguments, reads, target) in verbs.items():
        copies, runs, loads = [], [], []
        for repeat in range(options.repeats):
            if target is not None and repeat:
                shutil.rmtree(target)
            loads.append(os.getloadavg()[0])
            copies.append(copy(reads[0], folder / "copy", options.cache))
            runs.append(convert(arguments, reads, options.cache))
        if verb == "export":
            shutil.rmtree(exported)
        ratios = [c["seconds"] / r["seconds"] for c, r in zip(copies, runs, strict=True)]
        synced = [c["synced_seconds"] / r["seconds"] for c, r in zip(copies, runs, strict=True)]
        results[verb] = {
            "gb_per_second": size / 1e9 / median(r["seconds"] for r in runs),
            "cp_gb_per_second": size / 1e9 / median(c["seconds"] for c in copies),
            "cp_synced_gb_per_second": size / 1e9 / median(c["synced_seconds"] for c in copies),
            "ratio": median(ratios),
            "ratio_to_synced_cp": median(synced),
            "ratio_range": [min(ratios), max(ratios)],
            "peak_anonymous_gb": max(r["peak_anonymous_bytes"] for r in runs) / 1e9,
            "peak_resident_gb": max(r["peak_resident_bytes"] for r in runs) / 1e9,
            "process_seconds": median(r["process_seconds"] for r in runs),
            "load_average_before": loads,
            "copies": copies,
            "runs": runs,
        }
        print(row(verb, results[verb]), flush=True)
    return {"model_gb": size / 1e9, "tensors": 9 * options.layers + 3, "verbs": results}


def row(verb: str, found: dict[str, Any]) -> str:
    return (
        f"{verb:<8}{found['gb_per_second']:8.2f}{found['cp_gb_per_second']:8.2f}"
        f"{found['cp_synced_gb_per_second']:10.2f}{found['ratio']:8.2f}{found['ratio_to_synced_cp']:10.2f}"
        f"{found['peak_anonymous_gb']:10.2f}{found['process_seconds']:10.1f}"
        f"{max(found['load_average_before']):7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cache", choices=["cold", "warm"], default="cold")
    parser.add_argument("--folder", type=Path, default=None, help="scratch space (a folder of its own is made there)")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    heads = ("verb", "GB/s", "cp", "cp+sync", "ratio", "to synced", "anon. GB", "process s", "load")
    widths = (-8, 8, 8, 10, 8, 10, 10, 10, 7)
    print("".join(f"{head:<{-w}}" if w < 0 else f"{head:>{w}}" for head, w in zip(heads, widths, strict=True)))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert") as folder:
        results = measure(Path(folder), options)
    worst = min(each["ratio"] for each in results["verbs"].values())
    most = max(each["peak_anonymous_gb"] for each in results["verbs"].values())
    results |= {
        "cache": options.cache,
        "workers": options.workers,
        "repeats": options.repeats,
        "goals": {"ratio": GOAL_RATIO, "peak_anonymous_gb": GOAL_ANONYMOUS_GB},
        "met": {"ratio": worst >= GOAL_RATIO, "peak_anonymous_gb": most <= GOAL_ANONYMOUS_GB},
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {name: importlib.metadata.version(name) for name in ("tulu_hpc", "torch", "numpy", "xxhash")},
        "date": time.strftime("%Y-%m-%d"),
    }
    line = json.dumps(results)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
