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
from tulu_hpc.kernels.linear_logprob.tensor_parallel import HiddenReduction

MIB = 2**20


def measured(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype, budget: int, gradients: bool, used: int = 0, **options: bool
) -> int:
    """Peak of the `cpu` backend beyond arguments and returned gradients. used: rows with a target, 0 for all."""
    h, w = (torch.zeros(n, hidden, dtype=dtype, requires_grad=gradients) for n in (rows, vocab))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    target = torch.arange(rows).index_fill(0, order[used or rows :], -100)

    def run() -> tuple[Tensor, ...]:
        logprobs = linear_logprob(h, w, target, max_buffer_bytes=budget, backend="cpu", **options).logprobs_K
        return torch.autograd.grad(logprobs.sum(), (h, w)) if gradients else (logprobs,)

    run()  # what a process makes once is not this call's
    peak, returned = peak_bytes(run)
    return peak - sum(x.numel() * x.element_size() for x in returned)


CALLS = [
    (256, 512, 8000, 4 * MIB),
    (256, 512, 8000, 12 * MIB),
    (256, 512, 8000, 64 * MIB),
    (1500, 256, 3000, 8 * MIB),
    (1500, 256, 3000, 128 * MIB),
    (600, 1024, 2500, 10 * MIB),
]


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden", "vocab", "budget"), CALLS)
def test_peak_on_cpu_is_the_planned_one(rows, hidden, vocab, budget, dtype, with_gradients):
    """A narrower last block and gradients that come late make it a little less for bf16, whose pieces are widened."""
    planned = extra_bytes(rows, hidden, vocab, dtype.itemsize, budget, cuda=False, gradients=with_gradients)
    real = measured(rows, hidden, vocab, dtype, budget, with_gradients)
    below = 0.9 if dtype == torch.bfloat16 and with_gradients else 0.97
    assert below * planned <= real <= 1.03 * planned, (planned, real)
    sums = rows * hidden * 4 if dtype == torch.bfloat16 and with_gradients else 0
    assert planned <= max(budget, sums + min(budget, buffers.LEAST_BLOCK_BYTES))


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize(("rows", "hidden", "vocab", "budget"), CALLS[1::2])
def test_the_budget_holds_with_half_of_the_rows_ignored(
    rows, hidden, vocab, budget, batch_invariant, dtype, with_gradients
):
    """The copies of the others, of their gradient and of padded operands are within it."""
    used, size = rows // 2, dtype.itemsize
    if batch_invariant:
        budget = max(budget, 12 * MIB)  # one of its blocks, and an operand that is padded
    planned = extra_bytes(
        used,
        hidden,
        vocab,
        size,
        budget,
        cuda=False,
        gradients=with_gradients,
        total_rows=rows,
        batch_invariant=batch_invariant,
    )
    real = measured(rows, hidden, vocab, dtype, budget, with_gradients, used, batch_invariant=batch_invariant)
    assert 0.8 * planned <= real <= 1.03 * planned, (planned, real)
    sums = used * hidden * 4 if dtype == torch.bfloat16 and with_gradients else 0
    assert real <= max(budget, sums + min(budget, buffers.LEAST_BLOCK_BYTES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden", "vocab", "budget"), CALLS[::2])
def test_the_budget_holds_where_half_of_the_rows_have_no_gradient(rows, hidden, vocab, budget, dtype):
    """They are known in the backward pass, which copies the others then."""
    h, w = (torch.zeros(n, hidden, dtype=dtype, requires_grad=True) for n in (rows, vocab))

    def run() -> tuple[Tensor, ...]:
        logprobs = linear_logprob(h, w, torch.arange(rows), max_buffer_bytes=budget, backend="cpu").logprobs_K
        return torch.autograd.grad(logprobs[::2].sum(), (h, w))

    peak, returned = peak_bytes(run)
    sums = rows // 2 * hidden * 4 if dtype == torch.bfloat16 else 0
    least = sums + min(budget, buffers.LEAST_BLOCK_BYTES)
    assert peak - sum(x.numel() * x.element_size() for x in returned) <= max(budget, least)


class _NoRows:
    """Row passes that do nothing."""

    name, invariant_rows = "none", None

    def forward(self, *arguments) -> None: ...

    def backward(self, *arguments) -> None: ...


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("budget", [2, 6, 16, 60])
@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(512, 1024, 3000), (512, 1024, 1500), (2000, 128, 3000)])
def test_buffers_of_a_gpu_are_the_planned_ones(rows, hidden, vocab, budget, ignored, monkeypatch):
    """The block loops for bf16 operands on CUDA, with products that neither compute nor allocate."""
    monkeypatch.setattr(buffers, "LEAST_BLOCK_BYTES", MIB)
    monkeypatch.setattr(Problem, "half_gemm", True)
    for name in ("gemm", "gemm_add", "gemm_half"):
        monkeypatch.setattr(Problem, name, lambda *_: None)
    h = torch.zeros(2 * rows if ignored else rows, hidden, dtype=torch.bfloat16)
    w, target = torch.zeros(vocab, hidden, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    used = torch.arange(0, 2 * rows, 2) if ignored else None
    record = Problem(h, w, target, torch.arange(rows + 1), 1.0, 0.0, 0, budget * MIB, rows_U=used)
    plan = record.plan(allow_keep=True)

    def forward() -> tuple[Tensor, ...]:
        return blocks.forward(record, _NoRows(), True)

    def backward() -> tuple[Tensor, ...]:
        reduction = HiddenReduction(h, record.rows_U, "", False)
        return gradients.backward(record, _NoRows(), stats, stats + 1, kept, reduction, True), reduction.wait()

    peak, (stats, kept) = peak_bytes(forward)
    assert peak == pytest.approx(sum(plan.forward_bytes.values()), rel=0.03)
    peak, returned = peak_bytes(backward)
    extra = peak + kept.numel() * 4 - sum(x.numel() * 2 for x in returned)
    if plan.strategy == "whole":
        # The block is gone before the gradient of hidden is there.
        block = plan.backward_bytes["block of logits"]
        extra += min(block, h.numel() * 2)
    # No row is dropped here: the gradient moves in the end, when the buffers are gone, and 32 rows at a time on a CPU.
    moved = min(rows, buffers.MOVED_ROWS) * hidden * 2 if ignored and plan.strategy != "whole" else 0
    assert extra + moved == pytest.approx(sum(plan.backward_bytes.values()), rel=0.05)


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
