"""Objectives against formulas written out independently, in float64; and what their metrics count."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.forked import run_forked
from tulu_hpc.objectives.policy import policy_terms
from tulu_hpc.objectives.preference import preference_terms
from tulu_hpc.objectives.sft import sft_terms
from tulu_hpc.objectives.terms import Terms, sequence_lengths, sequence_sums
from tulu_hpc.parallel.layout import Layout, initialize


def value(terms: Terms, name: str) -> float:
    total, count = terms.metrics[name]
    return float(total) / float(count)


def pairs_batch(seed: int = 0) -> dict[str, Tensor]:
    """Three pairs: sequences 0..5, chosen first."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 5, 1, 2, 7, 4])
    sequence_id = torch.arange(6).repeat_interleave(lengths)
    logprobs = -5 * torch.rand(len(sequence_id), generator=generator, dtype=torch.float64)
    reference = -2.5 * lengths.double() + torch.randn(6, generator=generator, dtype=torch.float64)
    return {
        "logprobs_K": logprobs.requires_grad_(),
        "sequence_id_K": sequence_id,
        "pairs_P2": torch.tensor([[0, 1], [2, 3], [4, 5]]),
        "reference_sums_Q": reference,
        "lengths_Q": lengths.double(),
    }


def trl_dpo(sums: Tensor, reference: Tensor, beta: float, smoothing: float) -> Tensor:
    """TRL's sigmoid loss (`DPOTrainer.dpo_loss`), term by term from its documentation, mean over pairs."""
    pi_logratios = sums[0::2] - sums[1::2]
    ref_logratios = reference[0::2] - reference[1::2]
    logits = pi_logratios - ref_logratios
    sigmoid = torch.nn.functional.logsigmoid
    return (-sigmoid(beta * logits) * (1 - smoothing) - sigmoid(-beta * logits) * smoothing).mean()


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_preference_loss_and_gradient(kind: Any, smoothing: float) -> None:
    batch = pairs_batch()
    terms = preference_terms(**batch, global_pairs=3, kind=kind, beta=0.3, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(terms.loss, batch["logprobs_K"])
    fresh = batch["logprobs_K"].detach().requires_grad_()
    divisor = batch["lengths_Q"] if kind == "dpo_norm" else torch.ones(6, dtype=torch.float64)
    sums = torch.stack([part.sum() for part in fresh.split(batch["lengths_Q"].int().tolist())]) / divisor
    wanted = trl_dpo(sums, batch["reference_sums_Q"] / divisor, 0.3, smoothing)
    (wanted_gradient,) = torch.autograd.grad(wanted, fresh)
    assert float(terms.loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-12, rtol=0)
    assert value(terms, "loss") == pytest.approx(float(wanted.detach()))
    ratios = (sums.detach() - batch["reference_sums_Q"] / divisor) * 0.3
    assert value(terms, "rewards/chosen") == pytest.approx(float(ratios[0::2].mean()))
    assert value(terms, "rewards/margins") == pytest.approx(float((ratios[0::2] - ratios[1::2]).mean()))
    assert value(terms, "rewards/accuracies") == pytest.approx(float((ratios[0::2] > ratios[1::2]).double().mean()))
    assert value(terms, "logps/rejected") == pytest.approx(float((sums * divisor)[1::2].mean().detach()))


def test_preference_loss_equals_trl_source() -> None:
    """The formula above is the one that the installed TRL computes (its source is read, not imported)."""
    trl = pytest.importorskip("trl")
    from trl.trainer import dpo_trainer

    source = inspect.getsource(dpo_trainer)
    assert "logsigmoid(self.beta *" in source.replace("self.beta  *", "self.beta *"), trl.__version__


def test_a_source_named_sft_is_not_the_sft_term() -> None:
    names = ["other", "sft"]
    terms = preference_terms(
        **pairs_batch(),
        global_pairs=3,
        kind="dpo",
        beta=0.3,
        sft_weight=0.5,
        sources=["sft", "other", "sft"],
        source_names=names,
    )
    parts = [terms.metrics[f"loss/{name}"] for name in names]
    assert [float(count) for _, count in parts] == [1.0, 2.0]
    assert sum(float(total) for total, _ in parts) == pytest.approx(3 * value(terms, "loss"))
    assert value(terms, "sft_loss") != pytest.approx(value(terms, "loss/sft"))


def test_margin_is_zero_against_itself() -> None:
    batch = pairs_batch()
    own = sequence_sums(batch["logprobs_K"].detach(), batch["sequence_id_K"], 6)
    terms = preference_terms(**{**batch, "reference_sums_Q": own}, global_pairs=3, kind="dpo", beta=5.0)
    assert float(terms.loss.detach()) == math.log(2)
    assert value(terms, "rewards/margins") == 0.0


def test_empty_pack_sends_a_gradient_of_zero_back() -> None:
    empty_K = torch.zeros(0, requires_grad=True)
    ids, pairs = torch.zeros(0, dtype=torch.int64), torch.zeros((0, 2), dtype=torch.int64)
    none = torch.zeros(0)
    dpo = preference_terms(
        empty_K,
        sequence_id_K=ids,
        pairs_P2=pairs,
        reference_sums_Q=none,
        lengths_Q=none,
        global_pairs=4,
        kind="dpo_norm",
        beta=1.0,
    )
    grpo = grpo_terms(empty_K, none, none, ids, none, "token_mean", 3)
    for terms in (dpo, grpo, sft_terms(empty_K, divisor=2.0)):
        assert terms.loss.requires_grad and float(terms.loss.detach()) == 0.0
        terms.loss.backward()
        assert all(float(total) == 0 and float(count) == 0 for total, count in terms.metrics.values())


def grpo_terms(
    logprobs: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    ids: Tensor,
    lengths: Tensor,
    normalisation: Any,
    count: int,
    **options: Any,
) -> Terms:
    return policy_terms(
        logprobs,
        behaviour_logprobs_K=behaviour,
        advantages_K=advantages,
        sequence_id_K=ids,
        lengths_Q=lengths,
        normalisation=normalisation,
        global_count=count,
        clip_low=0.2,
        clip_high=0.3,
        **options,
    )


@pytest.mark.parametrize("normalisation", ["token_mean", "sequence_mean"])
def test_policy_loss_and_gradient(normalisation: str) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 2, 5])
    ids = torch.arange(3).repeat_interleave(lengths)
    logprobs, behaviour, reference = -3 * torch.rand(3, 11, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.7, 0.2], dtype=torch.float64)[ids]
    found, wanted = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    count = 11 if normalisation == "token_mean" else 3
    terms = grpo_terms(
        found,
        behaviour,
        advantages,
        ids,
        lengths.double(),
        normalisation,
        count,
        reference_logprobs_K=reference,
        kl_coef=0.1,
    )
    ratio = (wanted - behaviour).exp()
    surrogate = torch.min(ratio * advantages, ratio.clip(0.8, 1.3) * advantages)
    k3 = (reference - wanted).exp() - (reference - wanted) - 1
    token = -surrogate + 0.1 * k3
    if normalisation == "token_mean":
        loss = token.mean()
    else:
        loss = torch.stack([part.mean() for part in token.split(lengths.tolist())]).mean()
    (a,), (b,) = torch.autograd.grad(terms.loss, found), torch.autograd.grad(loss, wanted)
    assert float(terms.loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-12)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert value(terms, "loss") == pytest.approx(float(loss.detach()))
    assert value(terms, "policy/kl") == pytest.approx(float(k3.mean().detach()))


def test_sft_divisors() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    terms = sft_terms(logprobs, divisor=2.0)
    assert float(terms.loss.detach()) == 3.5
    assert value(terms, "loss") == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sft_terms(torch.zeros(1), divisor=0.0), "no trained token"),
        (lambda: preference_terms(**pairs_batch(), global_pairs=0, kind="dpo", beta=1.0), "0 pairs"),
        (
            lambda: grpo_terms(
                *[torch.zeros(1)] * 3, torch.zeros(1, dtype=torch.int64), torch.ones(1), "token_mean", 0
            ),
            "0 units",
        ),
    ],
)
def test_empty_global_batch_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_lengths_count_the_whole_pack() -> None:
    assert sequence_lengths(torch.tensor([0, 0, 2]), 4).tolist() == [2.0, 0.0, 1.0, 0.0]


KINDS: list[dict[str, Any]] = [
    {"kind": "dpo"},
    {"kind": "dpo_norm", "sft_weight": 0.2},
    {"kind": "cdpo", "label_smoothing": 0.1, "weighting": "wpo"},
    {"kind": "robust", "label_smoothing": 0.1},
    {"kind": "simpo", "gamma": 0.5},
    {"kind": "ipo"},
    {"kind": "hinge"},
    {"kind": "orpo"},
    {"kind": "kto", "kl": 0.2, "undesirable_weight": 1.5},
]


def half_of_the_tokens() -> list[tuple[float, Tensor, dict[str, tuple[float, float]]]]:
    groups = initialize(Layout(context=2), seed=1)
    batch = pairs_batch()
    mine = torch.arange(len(batch["sequence_id_K"])) % 2 == groups.cp_rank
    logprobs = batch["logprobs_K"].detach()[mine].requires_grad_()
    rest = {**batch, "logprobs_K": logprobs, "sequence_id_K": batch["sequence_id_K"][mine]}
    results = []
    for options in KINDS:
        terms = preference_terms(**rest, global_pairs=3, beta=0.3, cp_group=groups.pg.cp, **options)
        (gradient,) = torch.autograd.grad(terms.loss, logprobs)
        whole = torch.zeros(len(mine), dtype=torch.float64)
        whole[mine] = gradient
        metrics = {k: (float(a), float(b)) for k, (a, b) in terms.metrics.items()}
        results.append((float(terms.loss.detach()), whole, metrics))
    return results


def test_context_parallel_ranks_share_a_sequence() -> None:
    batch = pairs_batch()
    by_rank = run_forked(2, half_of_the_tokens)
    for index, options in enumerate(KINDS):
        wanted = preference_terms(**batch, global_pairs=3, beta=0.3, **options)
        (gradient,) = torch.autograd.grad(wanted.loss, batch["logprobs_K"])
        results = [of_rank[index] for of_rank in by_rank]
        for loss, _, _ in results:
            assert loss == pytest.approx(float(wanted.loss.detach()), abs=1e-12)
        torch.testing.assert_close(results[0][1] + results[1][1], gradient, atol=1e-12, rtol=0)
        assert gradient.any()
        for name, (total, count) in wanted.metrics.items():
            sums = [result[2][name] for result in results]
            assert sum(s[0] for s in sums) == pytest.approx(float(total))
            assert sum(s[1] for s in sums) == float(count), "pairs are counted once, not once per rank"
