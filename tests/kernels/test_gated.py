"""The gated activation against torch in fp64; bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tulu_hpc.kernels import gated


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (7, 1023), (33, 1408), (3, 2049)])
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_torch(rows: int, width: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows + width)
    both = 4 * torch.randn(rows, 2 * width, generator=generator)
    grad = torch.randn(rows, width, generator=generator)
    exact = both.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    wanted = F.silu(gate) * up
    wanted.backward(grad.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = gated.forward(both)
        grad_both, again = gated.backward(both, grad)
    finally:
        torch.set_num_threads(before)
    assert exact.grad is not None
    torch.testing.assert_close(out.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_both.double(), exact.grad, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(again, out, rtol=3e-7, atol=1e-7)


def test_extreme_gates() -> None:
    """No overflow to infinity or NaN where the exact value is finite; a NaN stays one."""
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, float("nan")]])
    both = torch.cat((gate, torch.ones_like(gate)), dim=1)
    out = gated.forward(both)
    torch.testing.assert_close(out[:, :5], F.silu(gate[:, :5]), rtol=1e-6, atol=1e-6)
    grad_both, _ = gated.backward(both, torch.ones_like(gate))
    assert out[0, 5].isnan() and grad_both[0, 5].isnan()
    torch.testing.assert_close(grad_both[0, :5], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "both", [torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, 2).T]
)
def test_refuses(both: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="needed"):
        gated.forward(both)


def test_refuses_a_gradient_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="gradient"):
        gated.backward(torch.zeros(2, 4), torch.zeros(2, 3))
