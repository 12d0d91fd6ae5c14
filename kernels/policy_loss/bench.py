"""Benchmark of policy_loss and value_loss: loss, gradient and metrics, against the same in eager and compiled torch.

    python -m tulu_hpc.kernels.policy_loss.bench [--quick | --rehearse] [--json PATH] [--markdown PATH]

Columns:
    shape      K tokens in Q sequences; kind: of the loss
    pass       forward: loss and metrics, of ours the gradient too; both: with the gradient handed back
    ms         best turn: process CPU seconds over threads on CPU; on CUDA time between events, with what Python takes
               to launch
    GB/s       bytes that a pass must read and write
    roofline   GB/s over those of a copy of as many bytes in the same run (line `copy`)
    ratio      median over the turns of eager torch's time over this one's
    extra_MiB  peak memory beyond inputs and results
    error      both: largest error of the gradient over the largest gradient, against eager torch in float64
    kernel_us, launches   CUDA: time inside kernels and their number, by the profiler
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_hpc.kernels.bench_losses import EAGER, Loss, loss_goals, loss_lines
from tulu_hpc.kernels.bench_report import Goal, launch
from tulu_hpc.kernels.contest import ours
from tulu_hpc.kernels.policy_loss.ops import OP, policy_loss
from tulu_hpc.kernels.policy_loss.value import OP as VALUE
from tulu_hpc.kernels.policy_loss.value import value_loss
from tulu_hpc.kernels.timing import Run, Tables

KINDS: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", "clip_high": 0.28, "normalisation": "token_mean"},
    "grpo_truncated": {"kind": "grpo", "normalisation": "token_mean", "importance": "truncated"},
    "gspo": {"kind": "gspo", "normalisation": "sequence_mean"},
}


class Shape(NamedTuple):
    """Tokens in equal sequences."""

    label: str
    kind: str
    tokens: int
    sequences: int


def _shapes(*sizes: tuple[str, int, int]) -> list[Shape]:
    return [Shape(label, kind, tokens, count) for kind in (*KINDS, VALUE) for label, tokens, count in sizes]


QUICK = _shapes(("4k", 4096, 8))
FULL = _shapes(("64k, Q 64", 65536, 64), ("64k, Q 8", 65536, 8), ("8k, Q 64", 8192, 64))
CUDA = FULL + _shapes(("1M, Q 1024", 2**20, 1024))
CUDA_QUICK = _shapes(("64k, Q 64", 65536, 64))


def shrink(shape: Shape) -> Shape:
    """512 tokens in a quarter of the sequences, 16 at most."""
    return shape._replace(tokens=512, sequences=min(16, shape.sequences // 4))


TABLES = Tables(FULL, QUICK, CUDA, CUDA_QUICK, shrink)


def make(tokens: int, sequences: int, device: str) -> dict[str, Tensor]:
    """A pack of equal sequences; the policies differ as after one update."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(5, tokens, generator=generator).to(device)
    logprobs = -columns[0].abs()
    return {
        "logprobs": logprobs.requires_grad_(),
        "old": (logprobs + 0.1 * columns[1]).detach(),
        "behaviour": (logprobs + 0.1 * columns[2]).detach(),
        "reference": (logprobs + 0.1 * columns[3]).detach(),
        "advantages": columns[4].contiguous(),
        "ids": torch.arange(tokens, device=device) * sequences // tokens,
    }


def eager(c: dict[str, Tensor], sequences: int, options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a trainer without a fused loss runs, with the same metrics."""
    low, high = (3e-4, 4e-4) if options["kind"] == "gspo" else (0.2, options.get("clip_high", 0.2))
    log_ratio = c["logprobs"] - c["old"]
    lengths = log_ratio.new_zeros(sequences).index_add(0, c["ids"], torch.ones_like(log_ratio))
    if options["kind"] == "gspo":
        sums = log_ratio.new_zeros(sequences).index_add(0, c["ids"], log_ratio)
        log_ratio = (sums / lengths.clamp(min=1))[c["ids"]]
    ratio = log_ratio.exp()
    plain = -c["advantages"] * ratio
    clipped = -c["advantages"] * ratio.clamp(1 - low, 1 + high)
    policy = torch.maximum(plain, clipped)
    raw = (c["old"] - c["behaviour"]).exp()
    if "importance" in options:
        policy = policy * raw.clamp(max=2.0)
    d = c["logprobs"] - c["reference"]
    k3 = torch.expm1(-d) + d
    token = policy + 0.05 * k3
    if options["normalisation"] == "token_mean":
        loss = token.mean()
    else:
        loss = (token / lengths[c["ids"]]).sum() / (lengths > 0).sum()
    with torch.no_grad():
        behaviour = c["logprobs"] - c["behaviour"]
        metrics = {
            "loss": policy.sum(),
            "ratio": ratio.sum(),
            "ratio_min": ratio.amin(),
            "ratio_max": ratio.amax(),
            "low": ((ratio < 1 - low) & (c["advantages"] < 0)).sum(),
            "high": ((ratio > 1 + high) & (c["advantages"] > 0)).sum(),
            "behaviour_kl": (torch.expm1(behaviour) - behaviour).sum(),
            "k1": d.sum(),
            "k2": (d * d / 2).sum(),
            "k3": k3.sum(),
        }
        if "importance" in options:
            metrics |= {"importance": raw.clamp(max=2.0).sum(), "max": raw.amax(), "limited": (raw > 2.0).sum()}
    return loss, metrics


def eager_value(c: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped value loss; the columns of `make` stand for values, old values and returns."""
    values, old, returns = c["logprobs"], c["old"], c["advantages"]
    held = old + (values - old).clamp(-0.2, 0.2)
    square = (values - returns).square()
    loss = torch.maximum(square, (held - returns).square()) / 2
    with torch.no_grad():
        metrics = {
            "loss": loss.sum(),
            "clipped": ((values - old).abs() > 0.2).sum(),
            "squared_error": square.sum(),
            "value": values.sum(),
        }
    return loss.mean(), metrics


def measure(shape: Shape, run: Run) -> list[dict[str, Any]]:
    """Lines of both passes for eager and compiled torch and each backend."""
    c = make(shape.tokens, shape.sequences, run.device)
    doubled = {key: x if key == "ids" else x.detach().double() for key, x in c.items()}
    doubled["logprobs"].requires_grad_()
    value = shape.kind == VALUE
    options = {} if value else KINDS[shape.kind]

    def theirs(c: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return eager_value(c) if value else eager(c, shape.sequences, options)

    fused: Callable[..., Any]
    if value:
        fused = partial(value_loss, c["logprobs"], c["old"], c["advantages"], clip=0.2, normalisation="token_mean")
    else:
        fused = partial(
            policy_loss, c["logprobs"], c["behaviour"], c["advantages"], c["ids"], old_logprobs_K=c["old"],
            reference_logprobs_K=c["reference"], kl_coef=0.05, num_sequences=shape.sequences, **options,
        )  # fmt: skip

    (exact,) = torch.autograd.grad(theirs(doubled)[0], doubled["logprobs"])
    compiled = torch.compile(theirs, dynamic=False)
    losses: dict[str, Loss | str] = {
        EAGER: lambda: theirs(c),
        "torch compiled": lambda: compiled(c),
    }
    losses |= ours(VALUE if value else OP, run, fused)
    # Read: logprobs, old, behaviour, reference, advantages, for gspo twice and the ids. Written: gradient and mask.
    moved = shape.tokens * (4 * 4 if value else 5 * 4 + 5)
    if shape.kind == "gspo":
        moved += shape.tokens * (4 * 4 + 8)
    columns = {"shape": shape.label, "kind": shape.kind, "K": shape.tokens, "Q": shape.sequences}
    return loss_lines(run, VALUE if value else OP, losses, c["logprobs"], exact, moved, columns)


def goals(table: list[dict[str, Any]]) -> list[Goal]:
    """Of 64k tokens on an H200, every kind."""
    return [goal for kind in (*KINDS, VALUE) for goal in loss_goals(table, kind, shape="64k, Q 64", kind=kind)]


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and, as the last line, one JSON object."""
    launch(OP, __doc__, arguments, TABLES, measure, goals)


if __name__ == "__main__":
    main()
