"""preference_loss: values against independent formulas, gradients by gradcheck, errors."""

import math

import pytest
import torch

from tulu_hpc.kernels import BackendError, available_backends, last_backend, preference_loss


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
