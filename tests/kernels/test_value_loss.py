"""value_loss: against its definition and the fp64 reference, gradients, extremes and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.fuzz import close
from tulu_hpc.kernels import BackendError, last_backend, value_loss

BACKENDS = ["reference", "cpu", "triton"]


def case(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values, moves, returns = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (values, values + 0.3 * moves, returns, weights)]


def run(values: Tensor, old: Tensor, returns: Tensor, weights: Tensor | None, **options: Any) -> tuple[Any, Tensor]:
    values = values.clone().requires_grad_()
    out = value_loss(values, old, returns, weights_K=weights, **options)
    return out, torch.autograd.grad(out.loss * 1.5, values)[0]


@pytest.mark.parametrize("clip", [0.2, None])
def test_by_hand(clip: float | None) -> None:
    columns = case(20)
    total, clipped = 0.0, 0
    for v, old, target, weight in zip(*(x.tolist() for x in columns)):
        held = min(max(v, old - clip), old + clip) if clip else v
        total += weight / 2 * max((v - target) ** 2, (held - target) ** 2) / 20
        clipped += held != v
    out, _ = run(*columns, clip=clip, normalisation="token_mean")
    assert last_backend("value_loss") == "reference"
    assert float(out.loss.detach()) == pytest.approx(total, rel=1e-12)
    assert float(out.metrics["value/clip_fraction"]) == clipped and (clipped > 0) is (clip is not None)
    assert float(out.metrics["value/value"]) == pytest.approx(float(columns[0].sum()))
    values, *rest = columns
    assert torch.autograd.gradcheck(lambda x: value_loss(x, *rest[:2], clip=clip).loss, values.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS[1:])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([0, 1, 3, 511, 512, 513, 1100]),
    seed=st.integers(0, 100),
    weighted=st.booleans(),
    clip=st.sampled_from([None, 0.1, 0.5]),
    normalisation=st.sampled_from(["sum", "token_mean", "constant"]),
)
def test_backends_against_the_reference(backend, tokens, seed, weighted, clip, normalisation):
    options = {"clip": clip, "normalisation": normalisation, "divisor": 3.0 if normalisation == "constant" else None}
    columns, columns32 = case(tokens, seed), case(tokens, seed, torch.float32)
    if not weighted:
        columns[3] = columns32[3] = None  # type: ignore[call-overload]
    want, want_grad = run(*columns, **options)
    got, grad = run(*columns32, **options, backend=backend)
    assert last_backend("value_loss") == backend
    close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    close(grad.double(), want_grad, rtol=1e-5, atol=1e-5)
    for name, value in want.metrics.items():
        close(got.metrics[name].double(), value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_and_strides(backend: str) -> None:
    values = torch.tensor([1e4, -1e4, 0.0, math.nan])
    out, grad = run(values, torch.zeros(4), torch.tensor(1.0).expand(4), None, clip=0.2, backend=backend)
    assert out.loss.isnan() and grad[3].isnan() and torch.equal(grad[:3] / 1.5, torch.tensor([1e4 - 1, -1e4 - 1, -1.0]))
    strided = torch.zeros(4, 2)[:, 0]
    assert float(run(strided, strided, strided, None, backend=backend)[0].loss.detach()) == 0


def test_errors() -> None:
    v, old, returns, _ = case(4)
    for message, error, args, options in (
        ("clip must be positive", ValueError, (v, old, returns), {"clip": 0.0}),
        ("normalisation must be", ValueError, (v, old, returns), {"normalisation": "sequence_mean"}),
        ("needs a positive divisor", ValueError, (v, old, returns), {"normalisation": "constant"}),
        ("float32 or float64", TypeError, (v.half(), old, returns), {}),
        ("returns_K must be torch.float64", TypeError, (v, old, returns.float()), {}),
        (r"old_values_K must be \[4\]", ValueError, (v, old[:2], returns), {}),
        ("on cpu as values_K, got .* on meta", ValueError, (v, old.to("meta"), returns), {}),
        ("has no float64", BackendError, (v, old, returns), {"backend": "cpu"}),
        ("no backend 'cuda'", BackendError, (v, old, returns), {"backend": "cuda"}),
    ):
        with pytest.raises(error, match=message):
            value_loss(*args, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_library(backend: str) -> None:
    v, old, returns, weights = case(5, dtype=torch.float32)
    arguments = (v.requires_grad_(), old, returns, weights, 0.2, 1.0, backend)
    torch.library.opcheck(torch.ops.tulu_hpc.value_loss, arguments)

    def loss(x: Tensor) -> Tensor:
        return value_loss(2 * x, old, returns, backend=backend).loss

    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(v), loss(v)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, v)[0], torch.autograd.grad(want, v)[0])
