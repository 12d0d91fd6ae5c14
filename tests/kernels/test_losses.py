"""policy_loss: values against independent formulas, gradients by gradcheck, errors."""

import math

import pytest
import torch

from tulu_hpc.kernels import last_backend, policy_loss
from tulu_hpc.kernels.policy_loss.reference import kl_estimate


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
