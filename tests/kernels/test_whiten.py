"""whiten: mean and deviation, of one process and over two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.forked import run_forked
from tulu_hpc.kernels import whiten


def test_whiten() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 100.0])
    mask = torch.tensor([True, True, True, False])
    white = whiten(x, mask)
    assert white[3] == 0 and white.dtype == torch.float32
    torch.testing.assert_close(white[:3], (x[:3] - x[:3].mean()) / x[:3].std())
    torch.testing.assert_close(whiten(x, mask, shift_mean=False)[:3], white[:3] + x[:3].mean())
    torch.testing.assert_close(whiten(x, unbiased=False), (x - x.mean()) / x.std(correction=0))
    grid = x.view(2, 2)
    assert torch.equal(whiten(grid).view(-1), whiten(x))
    assert not whiten(x.requires_grad_()).requires_grad


def test_whiten_is_numerically_safe() -> None:
    """A mean 1e4 times the deviation, equal numbers, one number, none at all."""
    noise = torch.randn(10000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (1e4 + noise).float()
    white = whiten(x)
    exact = (x.double() - x.double().mean()) / x.double().std()
    torch.testing.assert_close(white.double(), exact, rtol=1e-5, atol=1e-6)
    naive = x.square().mean() - x.mean() ** 2
    assert abs(float(naive) - float(x.double().var())) > 0.1, "in fp32 the variance would be lost"
    assert whiten(torch.full((7,), 0.1)).abs().max() < 1e-3
    assert whiten(torch.tensor([3.0])).tolist() == [0.0] and len(whiten(torch.zeros(0))) == 0
    assert whiten(torch.tensor([3.0, 4.0]), torch.tensor([False, False])).tolist() == [0.0, 0.0]


def test_whiten_errors() -> None:
    x = torch.zeros(3)
    with pytest.raises(TypeError, match="floating point"):
        whiten(x.long())
    with pytest.raises(TypeError, match="mask_K must be bool"):
        whiten(x, x)
    with pytest.raises(ValueError, match=r"mask_K must be \[3\]"):
        whiten(x, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="eps"):
        whiten(x, eps=0.0)


def whole_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(11, generator=generator) + 5, torch.rand(11, generator=generator) > 0.3


def whiten_part() -> list[float]:
    x, mask = whole_batch()
    part = slice(0, 4) if dist.get_rank() == 0 else slice(4, 11)
    return whiten(x[part], mask[part], group=dist.group.WORLD).tolist()


def whiten_with_an_empty_rank() -> list[float]:
    x, _ = whole_batch()
    return whiten(x if dist.get_rank() == 0 else x[:0], group=dist.group.WORLD).tolist()


def test_whiten_over_two_processes() -> None:
    x, mask = whole_batch()
    first, second = run_forked(2, whiten_part)
    torch.testing.assert_close(torch.tensor(first + second), whiten(x, mask), rtol=1e-6, atol=1e-7)
    first, second = run_forked(2, whiten_with_an_empty_rank)
    assert second == []
    torch.testing.assert_close(torch.tensor(first), whiten(x), rtol=1e-6, atol=1e-7)
