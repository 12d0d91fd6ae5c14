"""preference_loss and policy_loss: values against independent formulas, gradients by gradcheck, errors."""

import math

import pytest
import torch

from tulu_hpc.kernels import BackendError, available_backends, last_backend, policy_loss, preference_loss
from tulu_hpc.kernels.policy_loss.reference import kl_estimate


def preference_case():
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4, 2]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logprobs = -torch.rand(10, generator=generator, dtype=torch.float64)
    reference = -3 * torch.rand(4, generator=generator, dtype=torch.float64)
    return logprobs, ids, reference, torch.tensor([[0, 1], [3, 2]]), lengths


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_by_hand(kind, smoothing):
    logprobs, ids, reference, pairs, lengths = preference_case()
    beta, want, accuracies = 0.5, 0.0, 0
    ratio = [
        float(logprobs[ids == q].sum() - reference[q]) / (lengths[q] if kind == "dpo_norm" else 1) for q in range(4)
    ]
    for chosen, rejected in pairs.tolist():
        margin = beta * (ratio[chosen] - ratio[rejected])
        want += (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(math.exp(margin))
        accuracies += margin > 0
    loss, metrics = preference_loss(logprobs, ids, reference, pairs, kind=kind, beta=beta, label_smoothing=smoothing)
    assert float(loss) == pytest.approx(want, rel=1e-12)
    assert float(metrics["rewards/accuracies"]) == accuracies
    assert float(metrics["rewards/margins"]) == pytest.approx(
        float(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    )
    assert float(metrics["logps/chosen"]) == pytest.approx(float(logprobs[ids == 0].sum() + logprobs[ids == 3].sum()))
    assert last_backend("preference_loss") == "reference"
    assert torch.autograd.gradcheck(
        lambda x: preference_loss(x, ids, reference, pairs, kind=kind, beta=beta, label_smoothing=smoothing).loss,
        logprobs.requires_grad_(),
    )


def test_sums_may_be_passed_in():
    logprobs, ids, reference, pairs, lengths = preference_case()
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, ids, logprobs).requires_grad_()
    for kind in ("dpo", "dpo_norm"):
        want = preference_loss(logprobs, ids, reference, pairs, kind=kind, beta=0.1).loss
        got = preference_loss(
            logprobs[:0],
            ids[:0],
            reference,
            pairs,
            kind=kind,
            beta=0.1,
            policy_sums_Q=sums,
            lengths_Q=torch.tensor(lengths),
        ).loss
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got, sums)
        assert grad.abs().min() > 0


def test_preference_extremes():
    """Margins of 1e4 neither overflow nor lose their gradient's sign; no pairs give 0."""
    logprobs = torch.tensor([-1e5, 0.0], requires_grad=True)
    ids, pairs = torch.tensor([0, 1]), torch.tensor([[0, 1]])
    loss = preference_loss(logprobs, ids, torch.zeros(2), pairs, beta=0.1).loss
    assert float(loss.detach()) == pytest.approx(1e4)
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, torch.tensor([-0.1, 0.1]))
    none = preference_loss(logprobs, ids, torch.zeros(2), pairs[:0], beta=0.1)
    assert float(none.loss.detach()) == 0


def test_preference_errors():
    logprobs, ids, reference, pairs, _ = preference_case()
    with pytest.raises(ValueError, match="dpo, dpo_norm"):
        preference_loss(logprobs, ids, reference, pairs, kind="dpa", beta=0.1)
    with pytest.raises(ValueError, match="beta"):
        preference_loss(logprobs, ids, reference, pairs, beta=0.0)
    with pytest.raises(ValueError, match=r"\[P, 2\]"):
        preference_loss(logprobs, ids, reference, pairs[0], beta=0.1)
    with pytest.raises(ValueError, match="differ"):
        preference_loss(logprobs[:3], ids, reference, pairs, beta=0.1)
    with pytest.raises(ValueError, match="lengths_Q"):
        preference_loss(logprobs, ids, reference, pairs, kind="dpo_norm", beta=0.1, policy_sums_Q=reference)
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        preference_loss(logprobs, ids, reference, pairs, beta=0.1, backend="cuda")
    assert available_backends("preference_loss") == {"reference": "usable"}


def policy_case():
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(12, generator=generator, dtype=torch.float64)
    behaviour = logprobs + torch.randn(12, generator=generator, dtype=torch.float64)
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    reference = logprobs + 0.3 * torch.randn(12, generator=generator, dtype=torch.float64)
    return (
        logprobs,
        behaviour,
        advantages,
        torch.arange(12) // 4,
        reference,
        torch.rand(12, generator=generator).double(),
    )


@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_grpo_by_hand(kl_kind):
    logprobs, behaviour, advantages, ids, reference, weights = policy_case()
    total, clipped = 0.0, 0
    for lp, b, a, r, w in zip(*(x.tolist() for x in (logprobs, behaviour, advantages, reference, weights))):
        ratio = math.exp(lp - b)
        bounded = min(max(ratio, 0.8), 1.28)
        policy = -min(ratio * a, bounded * a)
        clipped += bounded * a < ratio * a
        d = lp - r
        kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kl_kind]
        total += w * (policy + 0.05 * kl)
    options = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.05, "kl_kind": kl_kind}
    loss, metrics = policy_loss(
        logprobs, behaviour, advantages, ids, reference_logprobs_K=reference, weights_K=weights, **options
    )
    assert float(loss) == pytest.approx(total, rel=1e-12)
    assert float(metrics["policy/clip_fraction"]) == clipped > 0
    assert last_backend("policy_loss") == "reference"
    assert torch.autograd.gradcheck(
        lambda x: (
            policy_loss(
                x, behaviour, advantages, ids, reference_logprobs_K=reference, weights_K=weights, **options
            ).loss
        ),
        logprobs.requires_grad_(),
    )


def test_first_step_is_the_policy_gradient():
    """Equal policies: ratio 1, KL 0, gradient -advantage; clipped tokens have none."""
    logprobs, _, advantages, ids, _, _ = policy_case()
    logprobs.requires_grad_()
    loss, metrics = policy_loss(
        logprobs, logprobs.detach(), advantages, ids, reference_logprobs_K=logprobs.detach(), kl_coef=1.0
    )
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], -advantages)
    assert float(metrics["policy/kl"]) == 0 and float(metrics["policy/ratio"]) == 12
    loss = policy_loss(logprobs, logprobs.detach() - 1, advantages.abs(), ids).loss
    assert not torch.autograd.grad(loss, logprobs)[0].any()


def test_k3_is_accurate_near_zero_and_bounded():
    tiny = torch.tensor([1e-4], dtype=torch.float32)
    assert float(kl_estimate(tiny, torch.zeros(1), "k3")) == pytest.approx(0.5e-8, rel=1e-2)
    assert torch.isfinite(kl_estimate(torch.tensor([-1e4]), torch.zeros(1), "k3")).all()


def test_policy_errors():
    logprobs, behaviour, advantages, ids, reference, _ = policy_case()
    with pytest.raises(ValueError, match="grpo"):
        policy_loss(logprobs, behaviour, advantages, ids, kind="ppa")
    with pytest.raises(ValueError, match="advantages_K"):
        policy_loss(logprobs, behaviour, advantages[:3], ids)
    with pytest.raises(ValueError, match="reference_logprobs_K"):
        policy_loss(logprobs, behaviour, advantages, ids, kl_coef=0.1)
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        policy_loss(logprobs, behaviour, advantages, ids, reference_logprobs_K=reference, kl_kind="k9")
    with pytest.raises(ValueError, match="clip_low"):
        policy_loss(logprobs, behaviour, advantages, ids, clip_low=-0.1)
    assert policy_loss(*(x[:0] for x in (logprobs, behaviour, advantages, ids))).loss == 0
