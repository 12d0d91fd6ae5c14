"""linear_logprob against other libraries' kernels: log-probs, entropy and both gradients."""

import pytest
import torch

from tests.kernels.linear_logprob_cases import problem
from tulu_hpc.kernels import linear_logprob
from tulu_hpc.kernels.linear_logprob import peers

NAMES = ["dense", "torch chunked", "liger", "cut-cross-entropy"]


def _values(function, h, w, target, weights):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    logprobs = function(h, w, target)
    return [logprobs.detach(), *torch.autograd.grad((logprobs * weights).sum(), (h, w))]


def agree(name: str, backend: str, seed: int) -> None:
    """Sizes, values and ignored targets by the seed."""
    found = {"dense": peers.dense, **peers.available()}
    if name not in found:
        pytest.skip(f"{name} is not installed (extra `peers`, or a newer torch)")
    generator = torch.Generator().manual_seed(seed)
    rows, hidden, vocab = (int(torch.randint(2, high, (1,), generator=generator)) for high in (60, 50, 400))
    h, w, target, _ = problem(rows, hidden, vocab, rows, seed=seed)
    target[torch.rand(rows, generator=generator) < 0.2] = -100
    target[0] = 1
    weights = torch.randn(rows, generator=generator)
    mine = _values(lambda a, b, t: linear_logprob(a, b, t, backend=backend).logprobs_K, h, w, target, weights)
    # cut-cross-entropy's compiled path runs uncompiled here: the same formula, half a minute less.
    with torch.compiler.set_stance("force_eager"):
        theirs = _values(found[name], h, w, target, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_peer(name, backend):
    agree(name, backend, 0)


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_peer_on_random_cases(name, soak_figures):
    for seed in range(1, 251):
        agree(name, "cpu", seed)
    soak_figures(cases=250)


def test_entropy_and_temperature_agree_with_liger():
    function = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    h, w, target, _ = problem(24, 16, 200, 24)
    target[3] = -100
    weights = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    results = []
    for theirs in (True, False):
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        if theirs:
            nll, entropy = function.LigerFusedLinearScaledCrossEntropyFunction.apply(a, b, target, 0.7, -100, 1, True)
            logprobs = -nll
        else:
            logprobs, entropy = linear_logprob(a, b, target, temperature=0.7, return_entropy=True)
            assert entropy is not None
        grads = torch.autograd.grad((logprobs * weights[0] + entropy * weights[1]).sum(), (a, b))
        results.append([logprobs.detach(), entropy.detach(), *grads])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-5)


def test_softcap_agrees_with_cut_cross_entropy():
    cce = pytest.importorskip("cut_cross_entropy")
    h, w, target, _ = problem(24, 16, 200, 24)
    weights = torch.randn(24, generator=torch.Generator().manual_seed(1))
    with torch.compiler.set_stance("force_eager"):
        theirs = _values(
            lambda a, b, t: -cce.linear_cross_entropy(a, b, t, softcap=5.0, reduction="none", impl="torch_compile"),
            h,
            w,
            target,
            weights,
        )
    mine = _values(lambda a, b, t: linear_logprob(a, b, t, softcap=5.0).logprobs_K, h, w, target, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
