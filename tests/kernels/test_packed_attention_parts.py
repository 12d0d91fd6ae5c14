"""The small kernels beside the flash libraries (merge, sum of copies), and the backend around them.

Runs under the interpreter on the CPU and, where there is a GPU, on that.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.attention_cases import CU, DEVICE, PREFIX, make_plan, oracle, tensors
from tests.kernels.fake_libraries import dense_backward, dense_forward
from tulu_hpc.kernels import BackendError, last_backend
from tulu_hpc.kernels.packed_attention import flash, parts
from tulu_hpc.kernels.packed_attention import plan as plan_module
from tulu_hpc.kernels.packed_attention.providers.aten import Aten

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(dtype):
    """Both backends against softmax over all keys; also rows for which one or both calls had no key."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, head_dim = 19, 3, 5
    out, part = (torch.randn(rows, heads, head_dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    lse, part_lse = (torch.randn(rows, heads, generator=generator).to(DEVICE) * 30 for _ in range(2))
    part_lse[4], lse[5] = lse[4], -torch.inf
    part_lse[6], lse[6] = -torch.inf, -torch.inf
    total = torch.logaddexp(lse.double(), part_lse.double())
    weight = lambda x: (x.double() - total).exp().nan_to_num(0)[..., None]  # noqa: E731
    want = out.double() * weight(lse) + part.double() * weight(part_lse)
    strided = part_lse.t().contiguous().t()  # as the flash libraries return it
    for backend in ("reference", "triton"):
        mine, mine_lse = out.clone(), lse.clone()
        parts.merge(mine, mine_lse, part, strided, backend=backend)
        assert last_backend(parts.MERGE) == backend
        keep = torch.arange(rows, device=DEVICE) != 6
        torch.testing.assert_close(
            mine[keep].double(), want[keep], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
        torch.testing.assert_close(mine_lse.double(), total, rtol=1e-6, atol=1e-6)
        assert float(mine[6].abs().max()) == 0
    empty = torch.empty(0, 3, 5, device=DEVICE)
    parts.merge(empty, empty[..., 0].contiguous(), empty, empty[..., 0].contiguous(), backend="triton")
    with pytest.raises(ValueError, match="shapes"):
        parts.merge(out, lse, part, lse[1:])
    with pytest.raises(ValueError, match="contiguous"):
        parts.merge(out.transpose(0, 1).contiguous().transpose(0, 1), lse, part, lse, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_copies(dtype):
    """Rows with no copy, one and many; the sum of 200 equal bf16 values does not stop growing."""
    generator = torch.Generator().manual_seed(0)
    index = torch.cat((torch.randint(1, 9, (50,), generator=generator), torch.full((200,), 9)))
    order = index.argsort(stable=True).to(DEVICE)
    counts = torch.bincount(index, minlength=11).tolist()
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
    part = torch.randn(250, 2, 7, generator=generator).to(dtype)
    part[50:] = 1 + 2**-7
    want = torch.zeros(11, 2, 7, dtype=torch.float64).index_add_(0, index, part.double())
    for backend in ("reference", "triton"):
        found = [
            parts.sum_copies(part.to(DEVICE), order, offsets, torch.float32, backend=backend).cpu() for _ in range(2)
        ]
        assert last_backend(parts.SUM_COPIES) == backend
        assert torch.equal(*found)
        torch.testing.assert_close(found[0].double(), want, rtol=1e-6, atol=1e-5)
        assert parts.sum_copies(part.to(DEVICE), order, offsets, dtype, backend=backend).dtype == dtype
    with pytest.raises(ValueError, match="do not fit"):
        parts.sum_copies(part, order[1:], offsets, dtype)
    with pytest.raises(ValueError, match="contiguous"):
        parts.sum_copies(part.to(DEVICE).transpose(1, 2), order, offsets, dtype, backend="triton")
    with pytest.raises(BackendError, match="fp32"):
        parts.sum_copies(part.to(DEVICE).double(), order, offsets, torch.float64, backend="triton")


def _aten_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
    return *dense_forward(q, k, v, cu_q, cu_k, causal, scale), None, None, None


def _aten_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale):
    return dense_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal, scale)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("strategy", ["repeat", "merge"])
@pytest.mark.parametrize("reorder", [False, True])
def test_the_flash_backend_around_its_library(backend, strategy, reorder, monkeypatch):
    """Everything of the CUDA backend but the library's two kernels, which the dense definition replaces."""
    library = Aten()
    library.functions = {"_flash_attention_forward": _aten_forward, "_flash_attention_backward": _aten_backward}
    monkeypatch.setattr(plan_module, "_library", lambda device: "flash")
    for op in (parts.MERGE, parts.SUM_COPIES):
        monkeypatch.setenv(f"TULU_HPC_{op.upper()}_BACKEND", backend)
    order = torch.randperm(88, generator=torch.Generator().manual_seed(1)) if reorder else None
    plan = make_plan(CU, PREFIX, head_dim=4, strategy=strategy, key_order=order)
    q, k, v, grad = inputs = tensors(plan, torch.float32)
    out, lse = flash.Flash(library).forward(q, k, v, plan, 0.5)
    found = [out, *flash.Flash(library).backward(grad, q, k, v, out, lse, plan, 0.5)]
    if strategy == "merge":
        assert last_backend(parts.MERGE) == backend
    if strategy == "repeat" or reorder:
        assert last_backend(parts.SUM_COPIES) == backend
    for mine, right in zip(found, oracle(plan, inputs, scale=0.5)):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)
