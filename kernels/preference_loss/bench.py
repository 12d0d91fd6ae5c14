"""Benchmark of preference_loss, forward and gradient, against the same loss in eager and compiled torch.

    python -m tulu_hpc.kernels.preference_loss.bench [--quick | --rehearse] [--json PATH] [--markdown PATH]

Eager and compiled torch take part in dpo_norm; the other kinds are beside our reference. Columns:
    shape      K tokens in so many pairs; kind: of the loss
    pass       forward: loss and metrics, of ours the gradient too; both: with the gradient handed back
    ms         best turn: CPU seconds of the process per thread on CPU; on CUDA time between events, with what Python
               takes to launch
    GB/s       bytes that must be moved: log-probs, ids, coefficients
    roofline   GB/s over those of a copy of as many bytes in the same run (line `copy`)
    ratio      median over the turns of eager torch's time over this one's
    extra_MiB  peak memory beyond inputs and results
    error      both: largest error of the gradient over the largest gradient, against our reference in float64
    kernel_us, launches   CUDA: time inside kernels and their number, by the profiler
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tulu_hpc.kernels.bench_losses import EAGER, Loss, loss_goals, loss_lines
from tulu_hpc.kernels.bench_report import Goal, launch
from tulu_hpc.kernels.contest import ours
from tulu_hpc.kernels.preference_loss.ops import OP, preference_loss
from tulu_hpc.kernels.timing import Run, Tables

NORM = "dpo_norm"
OPTIONS: dict[str, dict[str, Any]] = {"kto": {"kl": 0.1}, "simpo": {"gamma": 0.5}}


class Shape(NamedTuple):
    """Tokens in pairs of sequences."""

    label: str
    kind: str
    tokens: int
    pairs: int


QUICK = [Shape("8k", NORM, 8192, 16), Shape("8k", "simpo", 8192, 16)]
FULL = [Shape("64k", kind, 65536, 64) for kind in (NORM, "dpo", "ipo", "simpo", "orpo", "kto")]
FULL += [Shape("1M", NORM, 2**20, 1024)]
CUDA_QUICK = FULL[:1]


def shrink(shape: Shape) -> Shape:
    """128 tokens in 4 pairs."""
    return shape._replace(tokens=128, pairs=4)


TABLES = Tables(FULL, QUICK, FULL, CUDA_QUICK, shrink)


def eager(logprobs: Tensor, ids: Tensor, reference: Tensor, pairs: Tensor, beta: float) -> tuple[Tensor, list[Tensor]]:
    """dpo_norm and its metrics as a trainer without a fused op writes them, sums in fp64."""
    sequences = reference.shape[0]
    sums = torch.zeros(sequences, dtype=torch.float64, device=ids.device).index_add(0, ids, logprobs.double())
    lengths = torch.zeros(sequences, device=ids.device).index_add(0, ids, torch.ones_like(logprobs)).clamp(min=1)
    rewards = beta * (sums.float() - reference) / lengths
    chosen, rejected = pairs.unbind(1)
    margins = rewards[chosen] - rewards[rejected]
    with torch.no_grad():
        metrics = [
            rewards[chosen].sum(),
            rewards[rejected].sum(),
            margins.sum(),
            (margins > 0).float().sum(),
            sums[chosen].sum(),
            sums[rejected].sum(),
            lengths[chosen].sum(),
            lengths[rejected].sum(),
        ]
    return -logsigmoid(margins).sum(), metrics


def measure(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """Lines of both passes for eager and compiled torch (dpo_norm) and each backend."""
    generator = torch.Generator().manual_seed(0)
    sequences = 2 * shape.pairs
    ids = torch.randint(0, sequences, (shape.tokens,), generator=generator).sort().values.to(run.device)
    logprobs = (-2 * torch.rand(shape.tokens, generator=generator)).to(run.device).requires_grad_()
    mean = -float(shape.tokens / sequences)
    reference = (mean + torch.randn(sequences, generator=generator)).to(run.device)
    pairs = torch.randperm(sequences, generator=generator).reshape(-1, 2).to(run.device)
    options: dict[str, Any] = {"kind": shape.kind, "beta": 0.5, **OPTIONS.get(shape.kind, {})}
    double = logprobs.detach().double().requires_grad_()
    oracle = preference_loss(double, ids, reference, pairs, backend="reference", **options)
    (exact,) = torch.autograd.grad(oracle.loss, double)
    losses: dict[str, Loss | str] = {}
    if shape.kind == NORM:
        compiled = torch.compile(eager, dynamic=False)
        losses[EAGER] = lambda: eager(logprobs, ids, reference, pairs, 0.5)
        losses["torch compiled"] = lambda: compiled(logprobs, ids, reference, pairs, 0.5)
    losses |= ours(OP, run, partial(preference_loss, logprobs, ids, reference, pairs, **options))
    columns = {"shape": shape.label, "kind": shape.kind, "K": shape.tokens, "pairs": shape.pairs}
    return loss_lines(run, OP, losses, logprobs, exact, shape.tokens * (4 + 8 + 4), columns)


def goals(table: list[dict[str, Any]]) -> list[Goal]:
    """Of 64k tokens on an H200."""
    return loss_goals(table, NORM, shape="64k", kind=NORM)


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and, as the last line, one JSON object."""
    launch(OP, __doc__, arguments, TABLES, measure, goals)


if __name__ == "__main__":
    main()
