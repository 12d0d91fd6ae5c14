"""Memory of linear_logprob: what `buffers` says against every allocation of the CPU allocator, and its budget.

Not measured here: CUDA. Its block loops run here with products that allocate nothing, so their buffers are counted;
what cuBLAS and the CUDA allocator add is not.
"""

import pytest
import torch
from torch import Tensor

from tests.memory import peak_bytes
from tulu_hpc.kernels import linear_logprob
from tulu_hpc.kernels.linear_logprob import blocks, buffers, gradients
from tulu_hpc.kernels.linear_logprob.buffers import Sizes, extra_bytes, plan_buffers
from tulu_hpc.kernels.linear_logprob.problem import Problem

MIB = 2**20


def measured(rows: int, hidden: int, vocab: int, dtype: torch.dtype, budget: int, with_gradients: bool) -> int:
    """Peak of the `cpu` backend beyond arguments and returned gradients."""
    h, w = (torch.zeros(n, hidden, dtype=dtype, requires_grad=with_gradients) for n in (rows, vocab))
    target = torch.arange(rows)

    def run() -> tuple[Tensor, ...]:
        logprobs = linear_logprob(h, w, target, max_buffer_bytes=budget, backend="cpu").logprobs_K
        return torch.autograd.grad(logprobs.sum(), (h, w)) if with_gradients else (logprobs,)

    run()  # what a process makes once is not this call's
    peak, returned = peak_bytes(run)
    return peak - sum(x.numel() * x.element_size() for x in returned)


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "hidden", "vocab", "budget"),
    [
        (256, 512, 8000, 4 * MIB),
        (256, 512, 8000, 12 * MIB),
        (256, 512, 8000, 64 * MIB),
        (1500, 256, 3000, 8 * MIB),
        (1500, 256, 3000, 128 * MIB),
        (600, 1024, 2500, 10 * MIB),
    ],
)
def test_peak_on_cpu_is_the_planned_one(rows, hidden, vocab, budget, dtype, with_gradients):
    """A narrower last block and gradients that come late make it a little less for bf16, whose pieces are widened."""
    planned = extra_bytes(rows, hidden, vocab, dtype.itemsize, budget, cuda=False, gradients=with_gradients)
    real = measured(rows, hidden, vocab, dtype, budget, with_gradients)
    below = 0.9 if dtype == torch.bfloat16 and with_gradients else 0.97
    assert below * planned <= real <= 1.03 * planned, (planned, real)
    sums = rows * hidden * 4 if dtype == torch.bfloat16 and with_gradients else 0
    assert planned <= max(budget, sums + min(budget, buffers.LEAST_BLOCK_BYTES))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_copies_of_some_rows_are_planned(with_gradients):
    """With ignored rows, the others are copied, and so is their gradient."""
    rows, used, hidden, vocab, budget = 800, 600, 1024, 1000, 8 * MIB
    h, w = torch.zeros(rows, hidden, requires_grad=True), torch.zeros(vocab, hidden, requires_grad=True)
    target = torch.arange(rows).where(torch.arange(rows) < used, -100)

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(with_gradients):
            logprobs = linear_logprob(h, w, target, max_buffer_bytes=budget).logprobs_K
        return torch.autograd.grad(logprobs.sum(), (h, w)) if with_gradients else (logprobs,)

    peak, returned = peak_bytes(run)
    planned = extra_bytes(used, hidden, vocab, 4, budget, cuda=False, gradients=with_gradients, total_rows=rows)
    assert peak - sum(x.numel() * 4 for x in returned) == pytest.approx(planned, rel=0.05)


class _NoRows:
    """Row passes that do nothing."""

    name, invariant_rows = "none", None

    def forward(self, *arguments) -> None: ...

    def backward(self, *arguments) -> None: ...


@pytest.mark.parametrize("budget", [2, 6, 16, 60])
@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(512, 1024, 3000), (512, 1024, 1500), (2000, 128, 3000)])
def test_buffers_of_a_gpu_are_the_planned_ones(rows, hidden, vocab, budget, monkeypatch):
    """The block loops for bf16 operands on CUDA, with products that neither compute nor allocate."""
    monkeypatch.setattr(buffers, "LEAST_BLOCK_BYTES", MIB)
    monkeypatch.setattr(Problem, "half_gemm", True)
    for name in ("gemm", "gemm_add", "gemm_half"):
        monkeypatch.setattr(Problem, name, lambda *_: None)
    h, w = torch.zeros(rows, hidden, dtype=torch.bfloat16), torch.zeros(vocab, hidden, dtype=torch.bfloat16)
    record = Problem(h, w, torch.zeros(rows, dtype=torch.int64), torch.arange(rows + 1), 1.0, 0.0, 0, budget * MIB)
    plan = record.plan(allow_keep=True)

    def forward() -> tuple[Tensor, ...]:
        return blocks.forward(record, _NoRows(), True)

    def backward() -> tuple[Tensor, ...]:
        done: list[Tensor] = []
        return gradients.backward(record, _NoRows(), stats, stats + 1, kept, True, True, done.append), *done

    peak, (stats, kept) = peak_bytes(forward)
    assert peak == pytest.approx(sum(plan.forward_bytes.values()), rel=0.03)
    peak, returned = peak_bytes(backward)
    extra = peak + kept.numel() * 4 - sum(x.numel() * 2 for x in returned)
    if plan.strategy == "whole":
        # The block is gone before the gradient of hidden is there.
        block = plan.backward_bytes["block of logits"]
        extra += min(block, h.numel() * 2)
    assert extra == pytest.approx(sum(plan.backward_bytes.values()), rel=0.05)


@pytest.mark.parametrize("hidden", [4096, 8192, 16384])
@pytest.mark.parametrize(
    ("vocab", "strategies", "gib"),
    [
        (128256, {"kept"}, 4.5),
        (128256, {"blocks"}, 1.0),
        (16032, {"kept"}, 0.6),
        (16032, {"blocks", "whole"}, 0.3),
    ],
    ids=["speed", "memory", "speed, one of 8 ranks", "memory, one of 8 ranks"],
)
def test_heads_of_llama_on_a_gpu_fit(hidden, vocab, strategies, gib):
    """8192 rows, bf16: the budget is kept, and the GEMMs stay wide."""
    plan = plan_buffers(Sizes(8192, hidden, vocab, 2, cuda=True), int(gib * 2**30), allow_keep=True)
    assert plan.strategy in strategies and plan.extra_bytes <= gib * 2**30
    assert plan.backward.rows == (2048 if plan.strategy == "kept" else 8192) and plan.backward.columns >= 1024


def test_no_block_of_logits_beyond_a_tiny_budget():
    plan = plan_buffers(Sizes(64, 16, 5000, 4, cuda=False), 400, allow_keep=False)
    assert (plan.forward.rows, plan.forward.columns) == (1, 50)
    with pytest.raises(ValueError, match="does not hold one logit of 4 bytes"):
        plan_buffers(Sizes(64, 16, 5000, 4, cuda=False), 3, allow_keep=False)
