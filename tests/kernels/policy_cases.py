"""Random packs for the tests of policy_loss, and the loss by its definition, sequence by sequence, for autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.kernels import PolicyLossOutput, policy_loss, policy_sequence_sums
from tulu_hpc.kernels.policy_loss.problem import KINDS

COLUMNS = ("logprobs_K", "behaviour_logprobs_K", "advantages_K", "sequence_id_K")


def pack(lengths: list[int], seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    """All columns of a pack in fp64; advantages and weights differ between the tokens of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator, dtype=torch.float64)

    logprobs = -3 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    old = logprobs + spread * normal()
    return {
        "logprobs_K": logprobs,
        "behaviour_logprobs_K": old + spread * normal(),
        "advantages_K": normal(),
        "sequence_id_K": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)),
        "old_logprobs_K": old,
        "reference_logprobs_K": logprobs + spread * normal(),
        "weights_K": torch.rand(tokens, generator=generator, dtype=torch.float64),
        "entropy_K": 2 * torch.rand(tokens, generator=generator, dtype=torch.float64),
    }


def cast(columns: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: column if name == "sequence_id_K" else column.to(dtype) for name, column in columns.items()}


def run(columns: dict[str, Tensor], **options: Any) -> tuple[PolicyLossOutput, Tensor, Tensor | None]:
    """Output and the gradients of log-probs and entropies for an upstream gradient of 1.5."""
    columns = dict(columns)
    logprobs = columns.pop("logprobs_K").detach().clone().requires_grad_()
    behaviour, advantages, ids = (columns.pop(name) for name in COLUMNS[1:])
    entropy = columns.pop("entropy_K", None)
    entropy = None if entropy is None else entropy.detach().clone().requires_grad_()
    out = policy_loss(logprobs, behaviour, advantages, ids, entropy_K=entropy, **columns, **options)
    leaves = [logprobs] if entropy is None else [logprobs, entropy]
    gradients = torch.autograd.grad(out.loss * 1.5, leaves)
    return out, gradients[0], gradients[1] if entropy is not None else None


def definition(c: dict[str, Tensor], **options: Any) -> Tensor:
    """The loss in the words of the papers, with Python's conditions; autograd gives the gradient."""
    kind, importance = options["kind"], options.get("importance", "none")
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    lp, old, behaviour = c["logprobs_K"], c["old_logprobs_K"].tolist(), c["behaviour_logprobs_K"].tolist()
    advantages, weights, ids = c["advantages_K"].tolist(), c["weights_K"].tolist(), c["sequence_id_K"].tolist()
    total = lp.sum() * 0
    sequences = sorted(set(ids))
    for q in sequences:
        tokens = [k for k, owner in enumerate(ids) if owner == q]
        mean = torch.stack([lp[k] - old[k] for k in tokens]).mean()
        whole = math.exp(sum(old[k] - behaviour[k] for k in tokens))
        for k in tokens:
            a = advantages[k]
            ratio = (mean if kind == "gspo" else lp[k] - old[k]).exp()
            r = float(ratio.detach())
            if kind == "cispo":
                policy = -min(max(r, low), high) * a * lp[k]
            else:
                policy = torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
                if a < 0 and options.get("dual_clip"):
                    policy = torch.minimum(policy, torch.tensor(-a * options["dual_clip"], dtype=torch.float64))
            weight = whole if options.get("importance_level") == "sequence" else math.exp(old[k] - behaviour[k])
            if importance == "truncated":
                policy = policy * min(weight, options["importance_high"])
            elif importance == "masked":
                inside = options["importance_low"] <= weight <= options["importance_high"]
                policy = policy * (weight if inside else 0.0)
            d = lp[k] - c["reference_logprobs_K"][k]
            kl = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[options["kl_kind"]]
            token = policy + options["kl_coef"] * kl - options["entropy_coef"] * c["entropy_K"][k]
            share = {
                "sum": 1.0,
                "token_mean": 1 / len(ids),
                "sequence_mean": 1 / (len(sequences) * len(tokens)),
                "constant": 1 / (options.get("divisor") or 1.0),
            }[options["normalisation"]]
            total = total + weights[k] * share * token
    return total


FULL = {"kl_coef": 0.1, "entropy_coef": 0.05, "clip_low": 0.2, "clip_high": 0.3}


def sequence_sums(columns: dict[str, Tensor], options: dict[str, Any], sequences: int = 5) -> Tensor:
    names = ("importance", "importance_level", "importance_low", "importance_high")
    wanted = {name: column for name, column in columns.items() if name not in ("reference_logprobs_K", "entropy_K")}
    return policy_sequence_sums(
        **wanted, num_sequences=sequences, **{name: options[name] for name in names if name in options}
    )


def options_of(kind: str, normalisation: str, importance: str, level: str, kl_kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {**FULL, "kind": kind, "normalisation": normalisation, "kl_kind": kl_kind}
    options |= {"importance": importance, "importance_level": level, "importance_low": 0.6, "importance_high": 1.7}
    if normalisation == "constant":
        options["divisor"] = 7.5
    if kind == "ppo":
        options["dual_clip"] = 1.6
    if kind == "gspo":
        options |= {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.2}
    return options


SOME = [
    options_of(kind, normalisation, importance, level, kl)
    for kind, (normalisation, importance, level, kl) in itertools.product(
        KINDS,
        [
            ("sum", "none", "token", "k3"),
            ("token_mean", "truncated", "token", "k1"),
            ("sequence_mean", "masked", "sequence", "k2"),
            ("constant", "masked", "token", "k3"),
            ("sequence_mean", "truncated", "sequence", "k3"),
        ],
    )
]
NAMES = [f"{o['kind']}-{o['normalisation']}-{o['importance']}-{o['importance_level']}" for o in SOME]
