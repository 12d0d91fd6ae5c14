"""Benchmark of gae against the loops that trainers have, and its memory floor.

    python -m tulu_hpc.kernels.gae.bench [--quick | --rehearse] [--json PATH] [--markdown PATH]

Eager: a padded [segments, longest] batch and one step of tensor operations per position (as in TRL's PPO), padding
included. The line `copy` moves as many bytes as a pass must read and write, in the same run; roofline: share of its
GB/s. ms, ratio (eager over this one), extra_MiB, kernel_us and launches as in the benchmark of policy_loss; error:
largest of the advantages against the loop in float64.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels.bench_losses import COPY, EAGER
from tulu_hpc.kernels.bench_report import launch
from tulu_hpc.kernels.contest import Contestant, contest, lines, ours
from tulu_hpc.kernels.gae.ops import OP, gae
from tulu_hpc.kernels.timing import Run, Tables, copying

GAMMA, LAM = 1.0, 0.95


class Shape(NamedTuple):
    """Tokens in segments of varied lengths."""

    label: str
    tokens: int
    segments: int


QUICK = [Shape("4k, S 16", 4096, 16)]
FULL = [Shape(f"64k, S {segments}", 65536, segments) for segments in (64, 8, 1024)]
CUDA = [*FULL, Shape("1M, S 1024", 2**20, 1024)]
CUDA_QUICK = FULL[:1]


def shrink(shape: Shape) -> Shape:
    """256 tokens in a quarter of the segments, 8 at most."""
    return shape._replace(tokens=256, segments=min(8, shape.segments // 4))


TABLES = Tables(FULL, QUICK, CUDA, CUDA_QUICK, shrink)


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


def measure(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """Lines for the loop and each backend."""
    rewards, values, table = make(shape.tokens, shape.segments, run.device)
    exact = eager(rewards.double(), values.double(), table)
    contestants: dict[str, Contestant] = {EAGER: lambda: eager(rewards, values, table)}
    contestants |= ours(OP, run, partial(gae, rewards, values, table, gamma=GAMMA, lam=LAM))

    def error(result: Tensor | tuple[Tensor, ...]) -> float:
        advantages = result[0] if isinstance(result, tuple) else result
        return float((advantages.double() - exact).abs().max())

    moved = shape.tokens * 4 * 4  # rewards, values; advantages, returns
    floors = {COPY: copying(moved, run.device)}
    figures = contest(run, OP, contestants, floors=floors, baseline=EAGER, error=error)
    columns = {"shape": shape.label, "K": shape.tokens, "S": shape.segments, "pass": "forward"}
    return lines(figures, shape=columns, unit="GB/s", work=1e-9 * moved, floors=floors)


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and, as the last line, one JSON object."""
    launch(OP, __doc__, arguments, TABLES, measure)


if __name__ == "__main__":
    main()
