"""Triton launches on the current device: every op makes that of its tensors current around its kernels.

Here by counting in the interpreter; tests/gpu runs the ops themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tulu_hpc.kernels import gae, linear_logprob, packed_attention, plan_attention, policy_loss, value_loss
from tulu_hpc.kernels.packed_attention.plan import same_device
from tulu_hpc.kernels.rope.ops import rope

triton = pytest.importorskip("triton", reason="triton is not installed")


def attention() -> Tensor:
    plan = plan_attention([0, 3], [(0, 0)], heads=1, kv_heads=1, head_dim=16, device="cpu")
    q, k, v = (torch.randn(3, 1, 16, requires_grad=True) for _ in range(3))
    return packed_attention(q, k, v, plan, backend="triton")


def logprobs() -> Tensor:
    h, w = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    return linear_logprob(h, w, torch.arange(3), backend="triton").logprobs_K


def rotated() -> Tensor:
    q, k = (torch.randn(3, 1, 16, requires_grad=True) for _ in range(2))
    return rope(q, k, torch.arange(3), torch.ones(8), backend="triton")[0]


def policy() -> Tensor:
    x = torch.randn(3, requires_grad=True)
    ids = torch.zeros(3, dtype=torch.int64)
    return policy_loss(x, x.detach(), torch.ones(3), ids, num_sequences=1, backend="triton").loss


def value() -> Tensor:
    x = torch.randn(3, requires_grad=True)
    return value_loss(x, torch.zeros(3), torch.ones(3), backend="triton").loss


def advantages() -> Tensor:
    return gae(torch.ones(3), torch.ones(3), torch.tensor([0, 3]), gamma=1.0, lam=0.9, backend="triton")[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
@pytest.mark.parametrize("op", [attention, logprobs, rotated, policy, value, advantages])
def test_the_device_of_the_tensors_is_current(op: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    inside, launches = 0, 0
    launch = triton.runtime.interpreter.InterpretedFunction.__getitem__

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        nonlocal inside
        assert isinstance(tensor, Tensor)
        inside += 1
        yield
        inside -= 1

    def counted(function: object, grid: object) -> object:
        nonlocal launches
        assert inside, "a kernel is launched on whatever device is current"
        launches += 1
        return launch(function, grid)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton.runtime.interpreter.InterpretedFunction, "__getitem__", counted)
    out = op()
    forward = launches
    if out.requires_grad:
        out.sum().backward()
    assert forward and inside == 0
    if op in (attention, logprobs, rotated):
        assert launches > forward


def test_tensors_of_another_device_are_refused() -> None:
    """Not left to a kernel that reads addresses of another GPU, or of the host."""
    cpu, gpu, other = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    assert same_device(cpu, cpu) and same_device(gpu, gpu)
    assert not same_device(other, gpu) and not same_device(cpu, gpu)
    plan = plan_attention([0, 3], [(0, 0)], heads=1, kv_heads=1, head_dim=16, device="cpu")
    q = torch.zeros(3, 1, 16)
    with pytest.raises(ValueError, match="q is on meta, the plan is for cpu"):
        packed_attention(q.to("meta"), q, q, plan, backend="reference")
    ids, frequencies = torch.arange(3), torch.ones(8)
    there = q.to("meta")
    with pytest.raises(ValueError, match="position_ids are on cpu, q is on meta"):
        rope(there, there, ids, frequencies.to("meta"))
    with pytest.raises(ValueError, match="frequencies are on cpu, q is on meta"):
        rope(there, there, ids.to("meta"), frequencies)
    tables = (torch.ones(3, 8).to("meta"), torch.ones(3, 8))
    with pytest.raises(ValueError, match="frequencies are on cpu, q is on meta"):
        rope(there, there, None, tables)
