"""What hooks on a weight see of its gradient when megatron's sum has been added to already."""

from __future__ import annotations

import torch
from torch import nn

from tulu_hpc.models.cpu_linear import _accumulate


def test_hooks_see_the_gradient() -> None:
    """Uninitialised memory in its place would be taken for a NaN by the watch, now and then."""
    weight, grad = nn.Parameter(torch.zeros(3, 2)), torch.arange(6.0).view(3, 2)
    weight.main_grad = torch.ones(3, 2)  # type: ignore[attr-defined]
    torch.testing.assert_close(_accumulate(weight, grad), grad, rtol=0, atol=0)
    torch.testing.assert_close(weight.main_grad, grad + 1, rtol=0, atol=0)  # type: ignore[attr-defined]
