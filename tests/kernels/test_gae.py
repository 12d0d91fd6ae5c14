"""gae against a plain loop, backends against the fp64 reference; whiten on one and two processes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.fuzz import close
from tulu_hpc.kernels import BackendError, available_backends, gae, last_backend

BACKENDS = ["reference", "cpu", "triton"]


def case(
    lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    bootstrap = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return rewards.to(dtype), values.to(dtype), torch.tensor([0, *itertools.accumulate(lengths)]), bootstrap.to(dtype)


def by_definition(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[list[float], list[float]]:
    """A_t as the sum of (gamma lam)^l delta_(t+l): no recursion."""
    advantages, returns, first = [], [], 0
    for segment, length in enumerate(lengths):
        r, v = (x[first : first + length].tolist() for x in (rewards, values))
        v.append(0.0 if bootstrap is None else float(bootstrap[segment]))
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantage = math.fsum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length))
            advantages.append(advantage)
            returns.append(advantage + v[t])
        first += length
    return advantages, returns


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("bootstrapped", [True, False])
def test_reference_is_the_definition(gamma: float, lam: float, bootstrapped: bool) -> None:
    lengths = [0, 4, 1, 0, 7, 0]
    rewards, values, table, bootstrap = case(lengths)
    bootstrap_S = bootstrap if bootstrapped else None
    got = gae(rewards, values, table, gamma=gamma, lam=lam, bootstrap_S=bootstrap_S)
    assert last_backend("gae") == "reference"
    for found, wanted in zip(got, by_definition(rewards, values, lengths, gamma, lam, bootstrap_S)):
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_known_cases() -> None:
    """lam 1: the return is the discounted reward to go; lam 0: the TD error; a cut sequence goes on with its value."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.5])
    table = torch.tensor([0, 3])
    advantages, returns = gae(rewards, values, table, gamma=0.5, lam=1.0)
    assert returns.tolist() == [0.25, 0.5, 1.0] and advantages.tolist() == [-0.25, 0.0, 0.5]
    advantages, _ = gae(rewards, values, table, gamma=0.5, lam=0.0, bootstrap_S=torch.tensor([4.0]))
    assert advantages.tolist() == [-0.25, -0.25, 1 + 0.5 * 4 - 0.5]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=8),
    seed=st.integers(0, 100),
    gamma=st.sampled_from([1.0, 0.97, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    bootstrapped=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_backends_against_the_reference(backend, lengths, seed, gamma, lam, bootstrapped, index):
    *columns, bootstrap = case(lengths, seed)
    *columns32, bootstrap32 = case(lengths, seed, torch.float32)
    options = {"gamma": gamma, "lam": lam}
    want = gae(*columns, **options, bootstrap_S=bootstrap if bootstrapped else None)
    columns32[2] = columns32[2].to(index)
    got = gae(*columns32, **options, bootstrap_S=bootstrap32 if bootstrapped else None, backend=backend)
    assert last_backend("gae") == backend
    for found, wanted in zip(got, want):
        assert found.dtype == torch.float32
        close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95)])
def test_long_segments(backend: str, gamma: float, lam: float) -> None:
    """More than one block of a segment, and a block that ends exactly at a segment's begin."""
    lengths = [1024, 2500, 1, 1025]
    want = gae(*case(lengths)[:3], gamma=gamma, lam=lam)
    got = gae(*case(lengths, dtype=torch.float32)[:3], gamma=gamma, lam=lam, backend=backend)
    for found, wanted in zip(got, want):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend: str) -> None:
    def run(rewards: Tensor, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, table, gamma=0.99, lam=0.95, backend=backend)

    none = torch.zeros(0)
    assert all(len(x) == 0 for x in (*run(none, none, torch.tensor([0])), *run(none, none, torch.tensor([0, 0, 0]))))
    rewards = torch.tensor([1e4, -1e4, 3.0], requires_grad=True)
    advantages, returns = run(rewards, torch.tensor(2.0).expand(3), torch.tensor([0, 3]))
    assert torch.isfinite(advantages).all() and not advantages.requires_grad
    strided = torch.stack([rewards.detach(), rewards.detach()], 1)[:, 0]
    again, _ = run(strided, torch.full((3,), 2.0), torch.tensor([0, 3]))
    assert torch.equal(again, advantages) and torch.equal(returns, advantages + 2)
    # One segment knows nothing of its neighbours.
    broken = torch.tensor([1.0, math.nan, 1.0])
    advantages, _ = run(broken, torch.zeros(3), torch.tensor([0, 1, 2, 3]))
    assert advantages.isnan().tolist() == [False, True, False]


def test_errors() -> None:
    rewards, values, table, bootstrap = case([2, 3])
    good: dict[str, Any] = {"gamma": 1.0, "lam": 1.0}
    for message, error, args, options in (
        (r"\[0, 1\]", ValueError, (rewards, values, table), {"lam": 1.5}),
        ("rewards_K must be float32 or float64", TypeError, (rewards.long(), values, table), {}),
        ("values_K must be torch.float64", TypeError, (rewards, values.float(), table), {}),
        (r"values_K must be \[5\]", ValueError, (rewards, values[:3], table), {}),
        (r"bootstrap_S must be \[2\]", ValueError, (rewards, values, table), {"bootstrap_S": bootstrap[:1]}),
        ("cu_seqlens must be int32 or int64", TypeError, (rewards, values, table.float()), {}),
        ("must rise from 0 to 5", ValueError, (rewards, values, table[:-1]), {"bootstrap_S": None}),
        ("must rise from 0 to 5", ValueError, (rewards, values, torch.tensor([0, 4, 3, 5])), {}),
        ("on one device", ValueError, (rewards, values.to("meta"), table), {}),
        ("has no float64", BackendError, (rewards, values, table), {"backend": "triton"}),
        ("no backend 'cuda'", BackendError, (rewards, values, table), {"backend": "cuda"}),
    ):
        with pytest.raises(error, match=message):
            gae(*args, **{**good, **options})
    assert list(available_backends("gae")) == BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_library(backend: str) -> None:
    rewards, values, table, bootstrap = case([2, 0, 3], dtype=torch.float32)
    torch.library.opcheck(torch.ops.tulu_hpc.gae, (rewards, values, table, bootstrap, 0.99, 0.95, backend))

    def advantages(r: Tensor, v: Tensor) -> Tensor:
        return gae(2 * r, v, table, gamma=0.99, lam=0.95, bootstrap_S=bootstrap, backend=backend)[0]

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, values), advantages(rewards, values))
    assert last_backend("gae") == backend
