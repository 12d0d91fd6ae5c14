"""Policy losses of all kinds against the papers' formulas, sequence by sequence in float64, on one process and on two.

The defaults of a kind come from the configuration, so a wrong one shows here. Not proven here: the other options and
dtypes of the kernel (tests/kernels), and that the stage passes what it should (tests/rlvr).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.forked import run_forked
from tulu_hpc.config.rlvr_sections import KIND_DEFAULTS, RlvrSection
from tulu_hpc.objectives.advantages import overlong_share
from tulu_hpc.objectives.policy import policy_terms
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.layout import Layout, initialize

LENGTHS = ([4, 1, 7], [3, 6])  # of the answers in each of two packs
LONGEST = 9
WEIGHTS: list[dict[str, Any]] = [
    {},
    {"importance": "token", "importance_cap": 1.2},
    {"importance": "sequence", "importance_mode": "mask", "importance_low": 0.4, "importance_cap": 1.5},
    {"importance": "geometric", "importance_cap": 1.1},
    {"importance": "geometric", "importance_mode": "mask", "importance_low": 0.9, "importance_cap": 1.1},
]
CASES = [{"kind": kind, "kl_coef": 0.03, **weights} for kind in KIND_DEFAULTS for weights in WEIGHTS]
CASES += [
    {"kind": "grpo", "normalisation": "sequence_mean", "kl_kind": "k1", "kl_coef": 0.1},
    {"kind": "grpo", "dual_clip": 1.3},
    {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.1, "dual_clip": 1.1},
]


def section(case: dict[str, Any]) -> RlvrSection:
    return RlvrSection(prompts_per_step=1, samples_per_prompt=2, **case)


def pack(index: int) -> dict[str, Tensor]:
    """Columns of one pack; log-probs differ enough that every clip and limit is met."""
    generator = torch.Generator().manual_seed(index)
    lengths = torch.tensor(LENGTHS[index])
    tokens = int(lengths.sum())
    proximal = -3 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    normal = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    return {
        "logprobs": proximal + 0.25 * normal[0],
        "proximal": proximal,
        "behaviour": proximal + 0.15 * normal[1],
        "reference": proximal + 0.3 * normal[2],
        "advantage": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "ids": torch.arange(len(lengths)).repeat_interleave(lengths),
        "lengths": lengths.double(),
    }


def terms_of(case: dict[str, Any], columns: dict[str, Tensor], keep: Tensor, logprobs: Tensor, cp: Any) -> Terms:
    """Of the tokens `keep` of a pack, as the stage calls it."""
    rlvr = section(case)
    low, cap = rlvr.importance_bounds
    ids = columns["ids"][keep]
    answers = [length for each in LENGTHS for length in each]
    return policy_terms(
        logprobs,
        behaviour_logprobs_K=columns["behaviour"][keep],
        advantages_K=columns["advantage"][ids],
        sequence_id_K=ids,
        lengths_Q=columns["lengths"],
        normalisation=rlvr.normalisation,
        global_count=sum(answers) if rlvr.normalisation == "token_mean" else len(answers),
        constant_length=LONGEST,
        kind=rlvr.kind,
        clip_low=rlvr.clip_low,
        clip_high=rlvr.clip_high,
        dual_clip=rlvr.dual_clip,
        kl_coef=rlvr.kl_coef,
        kl_kind=rlvr.kl_kind,
        reference_logprobs_K=columns["reference"][keep],
        old_logprobs_K=columns["proximal"][keep] if rlvr.importance != "none" else None,
        importance=rlvr.importance,
        importance_mode=rlvr.importance_mode,
        importance_low=low,
        importance_cap=cap,
        cp_group=cp,
    )


def paper(case: dict[str, Any], leaves: list[Tensor]) -> tuple[Tensor, float]:
    """The loss of both packs by the formulas of docs/policy.md, and the mean importance weight over tokens."""
    rlvr = section(case)
    low, cap = rlvr.importance_bounds
    total = torch.zeros((), dtype=torch.float64)
    answers = tokens = 0
    weights: list[Tensor] = []
    for index, leaf in enumerate(leaves):
        columns = pack(index)
        for q, advantage in enumerate(columns["advantage"].tolist()):
            mine = columns["ids"] == q
            lp, behaviour, reference = leaf[mine], columns["behaviour"][mine], columns["reference"][mine]
            old, weight = behaviour, torch.ones(len(lp), dtype=torch.float64)
            if rlvr.importance != "none":
                old = columns["proximal"][mine]
                log = old - behaviour
                weight = {"token": log, "sequence": log.sum().expand(len(lp)), "geometric": log.mean().expand(len(lp))}[
                    rlvr.importance
                ].exp()
                inside = (weight >= low) & (weight <= cap)
                weight = weight.clamp(max=cap) if rlvr.importance_mode == "truncate" else weight * inside
            weights.append(weight)
            ratio = (lp - old).exp()
            if rlvr.kind == "gspo":
                ratio = (lp - old).mean().exp().expand(len(lp))
            clipped = ratio.clamp(1 - rlvr.clip_low, 1 + rlvr.clip_high)
            if rlvr.kind == "cispo":
                policy = -clipped.detach() * advantage * lp
            else:
                policy = -torch.minimum(ratio * advantage, clipped * advantage)
                if advantage < 0 and rlvr.dual_clip is not None:
                    policy = policy.clamp(max=-advantage * rlvr.dual_clip)
            d = lp - reference
            kl = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[rlvr.kl_kind]
            token = weight * policy + rlvr.kl_coef * kl
            total = (
                total
                + {
                    "token_mean": token.sum(),
                    "sequence_mean": token.mean(),
                    "sequence_sum": token.sum(),
                    "constant": token.sum() / LONGEST,
                }[rlvr.normalisation]
            )
            answers, tokens = answers + 1, tokens + len(lp)
    loss = total / (tokens if rlvr.normalisation == "token_mean" else answers)
    return loss, float(torch.cat(weights).mean())


Found = tuple[float, list[Tensor], dict[str, float]]


def on_this_rank(mine: Any, cp: Any, dtype: torch.dtype) -> list[Found]:
    """Of every case: the loss, the gradient of each pack's tokens, and metrics, added over ranks; `mine(pack)` says
    which tokens of a pack this rank has."""
    results = []
    for case in CASES:
        loss = torch.zeros((), dtype=torch.float64)
        gradients, sums = [], {}
        for index in range(2):
            columns = {k: c if k == "ids" else c.to(dtype) for k, c in pack(index).items()}
            keep = mine(index)
            gradient = torch.zeros(len(columns["ids"]), dtype=torch.float64)
            if keep is not None:
                leaf = columns["logprobs"][keep].clone().requires_grad_()
                terms = terms_of(case, columns, keep, leaf, cp)
                (found,) = torch.autograd.grad(terms.loss, leaf)
                gradient[keep] = found.double()
                loss += terms.loss.detach().double()
                for name, (value, count) in terms.metrics.items():
                    pair = torch.tensor([float(value), float(count)], dtype=torch.float64)
                    sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair
            gradients.append(gradient)
        if dist.is_initialized():
            for tensor in (loss, *gradients, *sums.values()):
                dist.all_reduce(tensor)
        results.append((float(loss), gradients, {name: float(pair[0] / pair[1]) for name, pair in sums.items()}))
    return results


def every(index: int) -> Tensor:
    return torch.arange(sum(LENGTHS[index]))


def two_ranks() -> dict[str, list[Found]]:
    found = {}
    groups = initialize(Layout(context=2), seed=1)
    for name, dtype in (("cp2", torch.float64), ("cp2 fp32", torch.float32)):
        found[name] = on_this_rank(lambda index: every(index)[groups.cp_rank :: 2], groups.pg.cp, dtype)
    rank = initialize(Layout(), seed=1).dp_rank
    found["dp2"] = on_this_rank(lambda index: every(index) if index == rank else None, None, torch.float64)
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, list[Found]]:
    found = run_forked(2, two_ranks)[0]
    found["one"] = on_this_rank(every, None, torch.float64)
    found["one fp32"] = on_this_rank(every, None, torch.float32)
    return found


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_kinds_are_the_papers(results: dict[str, list[Found]], case: int) -> None:
    leaves = [pack(index)["logprobs"].requires_grad_() for index in range(2)]
    loss, weight = paper(CASES[case], leaves)
    wanted = torch.autograd.grad(loss, leaves)
    assert any(bool(gradient.any()) for gradient in wanted)
    for layout, found in results.items():
        value, gradients, metrics = found[case]
        near = 1e-5 if "fp32" in layout else 1e-12
        assert value == pytest.approx(float(loss.detach()), abs=near), layout
        for gradient, right in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, right, atol=near, rtol=0, msg=layout)
        assert metrics["policy/ratio"] == pytest.approx(results["one"][case][2]["policy/ratio"], abs=1e-5)
        if CASES[case].get("importance"):
            assert metrics["policy/importance"] == pytest.approx(weight, abs=1e-5), layout
        assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-5), layout


def test_weights_are_per_sequence_not_per_pack() -> None:
    """Two answers in one pack, one of them drawn by another policy: only its weight differs from 1."""
    columns = {**pack(1), "behaviour": pack(1)["proximal"].clone()}
    columns["behaviour"][columns["ids"] == 1] -= 0.5
    case = {"kind": "grpo", "importance": "geometric", "importance_mode": "mask", "importance_cap": 1.5, "kl_coef": 0.0}
    leaf = columns["proximal"].clone().requires_grad_()
    terms = terms_of(case, columns, every(1), leaf, None)
    (gradient,) = torch.autograd.grad(terms.loss, leaf)
    total, count = terms.metrics["policy/importance_limited"]
    assert float(total) == 6 and count == 9, "the tokens of the second answer"
    assert gradient[columns["ids"] == 0].all() and not gradient[columns["ids"] == 1].any()


def test_importance_needs_proximal_logprobs() -> None:
    columns = pack(0)
    with pytest.raises(ValueError, match="old_logprobs_K"):
        policy_terms(
            columns["logprobs"],
            behaviour_logprobs_K=columns["behaviour"],
            advantages_K=columns["advantage"][columns["ids"]],
            sequence_id_K=columns["ids"],
            lengths_Q=columns["lengths"],
            normalisation="token_mean",
            global_count=12,
            importance="token",
        )


def test_overlong_share() -> None:
    """DAPO's example: a limit of 20480 tokens of which the last 4096 are the buffer."""
    wanted = {0: 0.0, 16384: 0.0, 16385: 1 / 4096, 18432: 0.5, 20480: 1.0, 30000: 1.0}
    assert {length: overlong_share(length, 20480, 4096) for length in wanted} == wanted
    assert overlong_share(20480, 20480, 0) == 0.0
    for bad in (-1, 9):
        with pytest.raises(ValueError, match="does not fit"):
            overlong_share(1, 8, bad)
