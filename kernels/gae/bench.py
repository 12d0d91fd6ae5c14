"""Benchmark of gae against the loops that trainers have, and its memory floor.

    python -m tulu_hpc.kernels.gae.bench [--quick] [--json PATH]

Eager: a padded [segments, longest] batch and one step of tensor operations per position (as in TRL's PPO), padding
included. The floor copies as many bytes as a pass must read and write, in the same run.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels.gae.ops import gae
from tulu_hpc.kernels.registry import last_backend
from tulu_hpc.kernels.timing import best_milliseconds, report

# tokens, segments
QUICK = [(4096, 16)]
FULL = [(65536, 64), (65536, 8), (65536, 1024)]
GAMMA, LAM = 1.0, 0.95


def make(tokens: int, segments: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a table of segments with lengths between half and three halves of the mean."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(segments, generator=generator, dtype=torch.float64) + 0.5
    ends = (weights.cumsum(0) / weights.sum() * tokens).round().long()
    table = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    rewards, values = torch.randn(2, tokens, generator=generator)
    return rewards.to(device), values.to(device), table.to(device)


def eager(rewards: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Advantages [K] by a loop over the positions of a padded batch."""
    lengths = table.diff()
    longest = int(lengths.max())
    position = torch.arange(longest, device=rewards.device)
    mask = position[None, :] < lengths[:, None]
    padded = rewards.new_zeros(2, len(lengths), longest)
    padded[0][mask], padded[1][mask] = rewards, values
    r, v = padded
    last, steps = torch.zeros_like(r[:, 0]), []
    for t in reversed(range(longest)):
        following = v[:, t + 1] if t + 1 < longest else 0.0
        last = r[:, t] + GAMMA * following - v[:, t] + GAMMA * LAM * last
        steps.append(last)
    return torch.stack(steps[::-1], 1)[mask]


def measure(tokens: int, segments: int, device: str, backends: list[str]) -> list[dict[str, Any]]:
    """Lines of the table: one for each backend."""
    rewards, values, table = make(tokens, segments, device)
    exact = eager(rewards.double(), values.double(), table)
    moved = tokens * 4 * 4
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    eager_ms = best_milliseconds(lambda: eager(rewards, values, table), device, repeats=3)
    lines = []
    for backend in backends:

        def ours(backend: str = backend) -> Tensor:
            return gae(rewards, values, table, gamma=GAMMA, lam=LAM, backend=backend)[0]

        error = float((ours().double() - exact).abs().max())
        line: dict[str, Any] = {"K": tokens, "S": segments, "backend": last_backend("gae")}
        line |= {"floor_ms": best_milliseconds(lambda: target.copy_(source), device), "eager_ms": eager_ms}
        line["ours_ms"] = best_milliseconds(ours, device, repeats=3)
        line |= {"ratio": line["eager_ms"] / line["ours_ms"], "MB": moved / 1e6, "error": error}
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and, as the last line, one JSON object; --json writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ["reference", "triton" if device == "cuda" else "cpu"]
    lines = [line for shape in (QUICK if options.quick else FULL) for line in measure(*shape, device, backends)]
    report("gae", lines, options.json)


if __name__ == "__main__":
    main()
