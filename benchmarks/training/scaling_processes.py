"""Processes of the scaling benchmark: pinned to a core each, one step of every size when told to."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACK_ROWS = 2048


@dataclass(frozen=True)
class Size:
    """A model and a step: layers, and tokens read by each rank, in sequences of `sequence`."""

    layers: int
    tokens: int
    sequence: int


class Job:
    """One process on each of `cores` (indices into those this process may use). A context manager.

    The processes are the ranks of one job, or (`connected` False) each a job of its own.
    """

    def __init__(self, sizes: Sequence[Size], folder: Path, cores: Sequence[int], *, connected: bool = True) -> None:
        available = sorted(os.sched_getaffinity(0))
        port = _free_port()
        self._processes = []
        for rank, core in enumerate(cores):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            if connected:
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(len(cores)), "LOCAL_RANK": str(rank)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            plan = {"sizes": [dataclasses.asdict(size) for size in sizes], "folder": str(folder)}
            plan["core"] = available[core]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", __file__, json.dumps(plan)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )

    def __enter__(self) -> Job:
        self._collect()  # set up
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def steps(self) -> list[float]:
        """Seconds of one step of every size; the slowest process counts."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return [max(each) for each in zip(*self._collect(), strict=True)]

    def _collect(self) -> list[list[float]]:
        replies = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"a process of the benchmark ended with code {process.wait()}; see its output above")
            replies.append(json.loads(line))
        return replies


def serve(plan: dict[str, Any]) -> None:
    """Entry of a process: build a trainer per model, say so, then one step of every size per line on stdin."""
    os.sched_setaffinity(0, {plan["core"]})
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    import torch

    from tulu_hpc.parallel.layout import Layout, destroy, initialize

    torch.set_num_threads(1)
    sizes = [Size(**each) for each in plan["sizes"]]
    groups = initialize(Layout(), seed=0)
    trainers = {
        layers: _trainer(Path(plan["folder"]), layers, groups) for layers in dict.fromkeys(s.layers for s in sizes)
    }
    replies.write("[]\n")
    for _line in sys.stdin:
        seconds = []
        for size in sizes:
            groups.barrier()
            started = time.perf_counter()
            _step(trainers[size.layers], size)
            seconds.append(time.perf_counter() - started)
        replies.write(json.dumps(seconds) + "\n")
    destroy()


def _trainer(folder: Path, layers: int, groups: Any) -> Any:
    from tulu_hpc.config.architecture import Architecture
    from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection
    from tulu_hpc.training.trainer import build_trainer

    path = folder / str(layers)
    return build_trainer(
        model=ModelSection(path=str(path)),
        parallel=ParallelSection(),
        optimizer=OptimizerSection(lr=1e-5, schedule="constant"),
        recompute="none",
        total_steps=1000,
        groups=groups,
        architecture=Architecture.from_hf(path),
    )


def _step(trainer: Any, size: Size) -> None:
    """Items of this rank, packed and trained on; every token but the first of a sequence is a target."""
    import torch

    from tulu_hpc.data.loader import pack_items
    from tulu_hpc.data.packed_batch import Item, TokenSequence
    from tulu_hpc.objectives.sft import sft_terms
    from tulu_hpc.training.step import train_step

    generator = torch.Generator().manual_seed(trainer.step + 1000 * trainer.groups.dp_rank)
    count, left = divmod(size.tokens, size.sequence)
    if left:
        raise ValueError(f"{size.tokens} tokens are not whole sequences of {size.sequence}")
    vocabulary = trainer.architecture.vocab_size
    # One more than the rows: the last token is only a target.
    draws = [torch.randint(0, vocabulary, (size.sequence + 1,), generator=generator) for _ in range(count)]
    items = [Item("sequence", [TokenSequence(tokens)]) for tokens in draws]
    packs = pack_items(items, capacity=max(PACK_ROWS, size.sequence))
    divisor = float(size.tokens * trainer.groups.dp_size)
    result = train_step(trainer, packs, lambda output, batch: sft_terms(output.logprobs_K, divisor=divisor))
    if result.rows != size.tokens * trainer.groups.dp_size:
        raise RuntimeError(f"the step read {result.rows} tokens, {size.tokens} on each rank were meant")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
