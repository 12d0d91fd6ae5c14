"""Which matrix products linear_logprob runs: FLOPs with kept and recomputed logits, rows that cost nothing."""

import pytest
import torch

from tests.kernels.linear_logprob_cases import BACKENDS, problem
from tulu_hpc.kernels import linear_logprob
from tulu_hpc.kernels.linear_logprob import blocks, buffers, gradients
from tulu_hpc.kernels.linear_logprob.problem import Problem
from tulu_hpc.kernels.linear_logprob.reference import ReferenceRows, linear_logprob_dense
from tulu_hpc.kernels.linear_logprob.tensor_parallel import HiddenReduction


@pytest.fixture
def gemms(monkeypatch):
    """(rows, inner, columns) of every matrix product of the block loop: a dispatch mode does not see inside an op."""
    seen: list[tuple[int, int, int]] = []
    for name in ("gemm", "gemm_add", "gemm_half"):
        original = getattr(Problem, name)

        def counted(self, *operands, original=original, adds=name == "gemm_add"):
            a, b = operands[1:] if adds else operands[:2]
            seen.append((a.shape[0], a.shape[1], b.shape[1]))
            original(self, *operands)

        monkeypatch.setattr(Problem, name, counted)
    return seen


def flops(seen: list[tuple[int, int, int]]) -> int:
    return sum(2 * m * k * n for m, k, n in seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_with_kept_and_with_recomputed_logits(backend, gemms):
    """6 N H V in all while the logits fit in the buffer, 8 N H V beyond it."""
    rows, hidden, vocab = 64, 16, 5000
    h, w, target, _ = problem(rows, hidden, vocab, rows)
    h, w = h.requires_grad_(), w.requires_grad_()
    product = 2 * rows * hidden * vocab
    for buffer, wanted in ((2**28, 3), (rows * 1500 * 4, 4)):
        gemms.clear()
        logprobs = linear_logprob(h, w, target, max_buffer_bytes=buffer, backend=backend).logprobs_K
        assert flops(gemms) == product
        logprobs.sum().backward()
        assert flops(gemms) == wanted * product


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("buffer", [2**28, 16 * 1500 * 4], ids=["kept", "recomputed"])
def test_rows_without_a_gradient_cost_nothing(backend, buffer, gemms):
    """Ignored rows enter no GEMM; rows whose upstream gradient is exactly zero enter none of the backward pass."""
    rows, hidden, vocab = 32, 8, 5000
    h, w, target, _ = problem(rows, hidden, vocab, rows)
    target[::2] = -100
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(2))
    weights[3::4] = 0.0
    results = []
    for name in (backend, "definition"):
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        if name == "definition":
            logprobs, _ = linear_logprob_dense(a.double(), b.double(), target)
        else:
            logprobs = linear_logprob(a, b, target, max_buffer_bytes=buffer, backend=backend).logprobs_K
        results.append(torch.autograd.grad((logprobs * weights).sum(), (a, b)))
    forward, backward = 2 * 16 * hidden * vocab, 2 * 8 * hidden * vocab
    assert flops(gemms) == forward + backward * (2 if buffer == 2**28 else 3)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


# How a GPU gets gradients of bf16 operands: (hidden size, budget, strategy, blocks of the backward pass) for 30 rows
# and a vocabulary of 90.
HALF = {
    "kept": (8, 2**20, "kept", (30, 90)),
    "kept in pieces": (8, 14500, "kept", (4, 12)),
    "kept in pieces, a copy of rows does not fit": (8, 13500, "kept", (4, 12)),
    "whole gradient": (64, 10000, "whole", (30, 22)),
    "blocks of all rows": (8, 8000, "blocks", (30, 28)),
    "blocks of some rows": (8, 6000, "blocks", (19, 40)),
}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", HALF)
def test_gradients_of_bf16_operands_on_a_gpu(name, zeros, monkeypatch, gemms):
    """The loops that a GPU runs, here with torch's bf16 GEMM on the CPU; values and FLOPs."""
    (hidden, budget, strategy, shape), rows, vocab = HALF[name], 30, 90
    h, w, target, _ = problem(rows, hidden, vocab, rows)
    h, w = h.bfloat16(), w.bfloat16()
    for constant, value in (("MIN_COLUMNS", 40 if name == "blocks of some rows" else 4), ("LEAST_BLOCK_BYTES", 2000)):
        monkeypatch.setattr(buffers, constant, value)
    monkeypatch.setattr(buffers, "KEPT_ROWS", 4 if name.startswith("kept in pieces") else 2048)
    _gemms_of_a_gpu(monkeypatch, gemms)
    record = Problem(h, w, target, torch.arange(rows + 1), 1.0, 0.0, 0, budget)
    plan = record.plan(allow_keep=True)
    assert (plan.strategy, (plan.backward.rows, plan.backward.columns)) == (strategy, shape)
    stats, kept = blocks.forward(record, ReferenceRows(), True)
    assert kept.shape == ((rows, vocab) if strategy == "kept" else (0, 0))
    grad = torch.zeros(rows, 4)
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    if zeros:
        weights[::3] = 0
    grad[:, 1], grad[:, 3] = -weights, weights
    reduction = HiddenReduction(h, None, "", False)
    gemms.clear()
    grad_weight = gradients.backward(record, ReferenceRows(), stats, grad, kept, reduction, True)
    multiplied = rows if "does not fit" in name else int((weights != 0).sum())
    product = 2 * multiplied * hidden * vocab
    assert flops(gemms) == product * (2 if strategy == "kept" else 3)
    a, b = h.double().requires_grad_(), w.double().requires_grad_()
    logprobs, _ = linear_logprob_dense(a, b, target)
    wanted = torch.autograd.grad((logprobs * weights).sum(), (a, b))
    for mine, want in zip((reduction.wait(), grad_weight), wanted):
        assert mine.dtype == torch.bfloat16
        assert float((mine.double() - want).norm() / want.norm()) < 6e-3


def _gemms_of_a_gpu(monkeypatch, seen) -> None:
    """bf16 operands, fp32 result: CPUs have no such product."""

    def gemm(self, a, b, out):
        seen.append((a.shape[0], a.shape[1], b.shape[1]))
        torch.mm(a.float(), b.float(), out=out)

    def gemm_add(self, total, a, b):
        seen.append((a.shape[0], a.shape[1], b.shape[1]))
        total.addmm_(a.float(), b.float())

    monkeypatch.setattr(Problem, "half_gemm", True)
    monkeypatch.setattr(Problem, "gemm", gemm)
    monkeypatch.setattr(Problem, "gemm_add", gemm_add)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_at_all(backend, gemms):
    h, w, target, row = problem(5, 4, 30, 9)
    h, w = h.requires_grad_(), w.requires_grad_()
    logprobs = linear_logprob(h, w, target, row_K=row, backend=backend).logprobs_K
    gemms.clear()
    grads = torch.autograd.grad((logprobs * 0.0).sum(), (h, w))
    assert not gemms and not grads[0].any() and not grads[1].any()


@pytest.mark.parametrize("setting", [True, False, (False, False)])
def test_bf16_products_are_summed_in_fp32(setting, monkeypatch):
    """cuBLAS may not add partial sums in bf16 while they are launched; the user's setting is there again afterwards."""
    flags = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    read = lambda: (getattr(flags, name), getattr(flags, f"{name}_split_k", True))  # noqa: E731
    before = read()
    seen = []

    def mm(a, b, out):
        seen.append(read())
        if len(seen) == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "mm", mm)
    a = torch.zeros(2, 2, dtype=torch.bfloat16)
    gemm_half = Problem(a, a, torch.zeros(2), torch.zeros(3), 1.0, 0.0, 0, 4096).gemm_half
    try:
        setattr(flags, name, setting)
        own = read()
        gemm_half(a, a, a)
        assert read() == own
        with pytest.raises(RuntimeError, match="out of memory"):
            gemm_half(a, a, a)
        assert read() == own and seen == [(False, own[1])] * 2
    finally:
        setattr(flags, name, before)
