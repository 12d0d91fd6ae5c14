"""linear_logprob with bf16 operands by each of a GPU's strategies: values, gradients, products and peak memory.

The CPU tests run the block loops of these strategies with replaced products; here they are cuBLAS's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.moved import DEVICE, REHEARSAL
from tests.kernels import test_linear_logprob_products as products
from tulu_hpc.kernels import last_backend, linear_logprob
from tulu_hpc.kernels.linear_logprob import onednn
from tulu_hpc.kernels.linear_logprob.buffers import Sizes, extra_bytes, plan_buffers
from tulu_hpc.kernels.linear_logprob.reference import linear_logprob_dense
from tulu_hpc.kernels.timing import extra_bytes as measured_bytes

MIB = 2**20
gemms = products.gemms  # a fixture
# hidden, vocabulary, budget in MiB and what a GPU does with it, for 256 rows.
CALLS = {
    "kept": (256, 4000, 16.0),
    "blocks": (256, 4000, 3.0),
    "whole": (512, 900, 0.9),
}


@pytest.mark.parametrize("strategy", CALLS)
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "half of the rows ignored"])
@pytest.mark.parametrize("zeros", [False, True], ids=["all gradients", "zero gradients"])
def test_bf16(strategy: str, ignored: bool, zeros: bool, gemms: list[tuple[int, int, int]]) -> None:
    (hidden, vocab, mebibytes), rows = CALLS[strategy], 256
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=generator) / 8).to(DEVICE, torch.bfloat16).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE)
    weights = torch.randn(rows, generator=generator).to(DEVICE)
    if ignored:
        target[::2] = -100
    if zeros:
        weights[1::4] = 0
    used, active = int((target >= 0).sum()), int(((target >= 0) & (weights != 0)).sum())
    # Budgets are of all rows: with half of them a GPU needs half.
    budget = int(mebibytes * MIB * (0.55 if ignored else 1))
    sizes = Sizes(used, hidden, vocab, 2, not REHEARSAL, REHEARSAL and onednn.available(), picked=ignored)
    planned = plan_buffers(sizes, budget, allow_keep=True).strategy
    assert REHEARSAL or planned == strategy

    def run() -> tuple[Tensor, ...]:
        out = linear_logprob(h, w, target, max_buffer_bytes=budget).logprobs_K
        return *torch.autograd.grad((out * weights).sum(), (h, w)), out.detach()

    grad_h, grad_w, logprobs = run()
    assert last_backend("linear_logprob") == ("cpu" if REHEARSAL else "cuda")
    flops = products.flops(gemms)
    a, b = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact, _ = linear_logprob_dense(a, b, target)
    torch.testing.assert_close(logprobs.double(), exact.detach(), rtol=0, atol=1e-5)
    for mine, want in zip((grad_h, grad_w), torch.autograd.grad((exact * weights).sum(), (a, b))):
        assert mine.dtype == torch.bfloat16
        assert float((mine.double() - want).norm() / want.norm()) < 6e-3
    assert flops == 2 * hidden * vocab * (used + active * (2 if planned == "kept" else 3))
    limit = extra_bytes(used, hidden, vocab, 2, budget, cuda=not REHEARSAL, total_rows=rows)
    # Allocations of CUDA are rounded up to 512 bytes.
    assert measured_bytes(run, DEVICE) <= 1.03 * max(limit, budget) + 64 * 512
