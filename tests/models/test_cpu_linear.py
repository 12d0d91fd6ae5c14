"""The CPU's linear layers against plain torch in fp64, at sizes that go to oneDNN; layouts: tests/training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.forked import single_process
from tests.training import tiny
from tulu_hpc.kernels.linear_logprob import onednn
from tulu_hpc.models import cpu_linear
from tulu_hpc.models.build import build_model

ROWS, INPUTS, OUTPUTS = 70, 96, 64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(gated: bool, x: Tensor, weight: Tensor) -> Tensor:
    if gated:
        return cpu_linear._GatedLinear.apply(x, weight)  # type: ignore[no-any-return]
    return cpu_linear._Linear.apply(x, weight, False, False, None)  # type: ignore[no-any-return]


def exact(gated: bool, x: Tensor, weight: Tensor) -> Tensor:
    if gated:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    return x @ weight.T


@pytest.mark.parametrize("gated", [False, True])
def test_equals_torch(gated: bool) -> None:
    x, weight, grad = draw(ROWS, 1, INPUTS * (1 + gated)), draw(OUTPUTS, INPUTS), draw(ROWS, 1, OUTPUTS)
    assert onednn.suits(x[:, 0, :INPUTS], weight.T)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    wanted = exact(gated, *wide)
    wanted.backward(grad.double())
    x.requires_grad_()
    weight.requires_grad_()
    out = run(gated, x, weight)
    out.backward(grad)
    assert out.shape == (ROWS, 1, OUTPUTS)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=2e-5)
    for mine, theirs in zip((x, weight), wide, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_hooks_see_the_gradient(gated: bool) -> None:
    """Also where megatron has a sum to add it to: the watch for NaN reads it there."""
    x, weight, grad = draw(ROWS, 1, INPUTS * (1 + gated)), draw(OUTPUTS, INPUTS), draw(ROWS, 1, OUTPUTS)
    parameter = torch.nn.Parameter(weight)
    parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones(OUTPUTS, INPUTS), False  # type: ignore[attr-defined]
    seen: list[Tensor] = []
    parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
    run(gated, x, parameter).backward(grad)
    wide = weight.double().requires_grad_()
    exact(gated, x.double(), wide).backward(grad.double())
    assert wide.grad is not None and len(seen) == 1
    torch.testing.assert_close(seen[0].double(), wide.grad, rtol=1e-5, atol=5e-5)
    assert (parameter.main_grad == 1).all() and not parameter.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_frozen_weight_keeps_no_activation() -> None:
    x = draw(ROWS, 1, INPUTS).requires_grad_()
    out = run(False, x, draw(OUTPUTS, INPUTS))
    assert out.grad_fn.saved_tensors[0] is None  # type: ignore[union-attr]
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("dtype", "ours"), [(torch.float32, True), (torch.float64, False), (torch.bfloat16, False)])
def test_which_models_get_them(dtype: torch.dtype, ours: bool) -> None:
    with single_process() as groups:
        layer = build_model(tiny.ARCHITECTURE, groups, dtype=dtype)[0].decoder.layers[0]
    modules = (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp, layer.mlp.linear_fc1)
    assert [type(m).__module__ == cpu_linear.__name__ for m in (*modules, layer.mlp.linear_fc2)] == [ours] * 5
