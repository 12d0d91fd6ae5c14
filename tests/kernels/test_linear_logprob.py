"""linear_logprob on one process: every backend against the definition in float64.

Not proved here: the CUDA row kernels' results (no device in CI); test_native.py checks that they are compiled.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.linear_logprob_cases import BACKENDS, compare, problem, sorted_by_row
from tulu_hpc.kernels import last_backend, linear_logprob
from tulu_hpc.kernels.linear_logprob.reference import linear_logprob_dense
from tulu_hpc.kernels.native import core


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 70),
    targets=st.integers(0, 20),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    softcap=st.sampled_from([None, 3.0]),
    buffer=st.sampled_from([4, 64, 1000, None]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_against_the_definition(backend, rows, vocab, targets, temperature, softcap, buffer, ignored, seed):
    h, w, target, row = problem(rows, 5, vocab, targets, seed)
    target[torch.rand(targets, generator=torch.Generator().manual_seed(seed)) < ignored] = -100
    compare(
        h,
        w,
        target,
        row,
        backend=backend,
        tolerance=1e-5,
        temperature=temperature,
        softcap=softcap,
        max_buffer_bytes=buffer,
    )


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_every_instruction_set(isa, softcap):
    if core().set_cpu_isa(isa):
        pytest.skip(f"this processor or build has no {isa}: {core().build_info()['cpu_isas']}")
    try:
        h, w, target, row = problem(6, 32, 10_007, 15, scale=3.0)
        compare(h, w, target, row, backend="cpu", tolerance=2e-5, softcap=softcap)
    finally:
        assert core().set_cpu_isa("auto") == 0


def test_threads_agree():
    h, w, target, row = problem(37, 16, 3001, 50)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stats, _, _ = torch.ops.tulu_hpc.linear_logprob_stats(
                *sorted_by_row(h, w, target, row), 1.0, 0.0, 0, 2**28, "cpu", "", False, False, False
            )
            results.append(stats)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [30.0, 1e4])
def test_extreme_logits(backend, magnitude):
    """One hidden unit of 1: logits are the weights, exactly; so the error is that of the row passes alone."""
    generator = torch.Generator().manual_seed(1)
    w = (torch.rand(501, 1, generator=generator) * 2 - 1) * magnitude
    w[0] = magnitude
    w[1] = -magnitude
    h = torch.ones(4, 1)
    target = torch.tensor([0, 1, 2, 3])
    logprobs, entropy, _, _ = compare(h, w, target, backend=backend, tolerance=1e-5)
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_and_one_hot_logits(backend):
    h = torch.ones(1, 1)
    equal = linear_logprob(h, torch.full((64, 1), -1e4), torch.tensor([5]), return_entropy=True, backend=backend)
    assert float(equal.logprobs_K) == pytest.approx(-math.log(64), abs=1e-6)
    assert equal.entropy_K is not None and float(equal.entropy_K) == pytest.approx(math.log(64), abs=1e-6)
    one_hot = torch.zeros(64, 1)
    one_hot[5] = 1e4
    result = linear_logprob(h, one_hot, torch.tensor([5]), return_entropy=True, backend=backend)
    assert float(result.logprobs_K) == 0.0
    assert result.entropy_K is not None and float(result.entropy_K) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_ignored_and_single(backend):
    h, w, target, _ = problem(3, 4, 11, 3)
    h.requires_grad_()
    ignored = linear_logprob(h, w, torch.full((3,), -100), return_entropy=True, backend=backend)
    assert ignored.logprobs_K.tolist() == [0, 0, 0]
    assert ignored.entropy_K is not None and ignored.entropy_K.tolist() == [0, 0, 0]
    (grad,) = torch.autograd.grad(ignored.logprobs_K.sum(), h)
    assert not grad.any()
    nothing = torch.zeros(0, dtype=torch.int64)
    assert linear_logprob(h, w, nothing, row_K=nothing, backend=backend).logprobs_K.shape == (0,)
    assert linear_logprob(h[:0], w, nothing, backend=backend).logprobs_K.shape == (0,)
    one = linear_logprob(h[:1], w, target[:1], backend=backend).logprobs_K
    torch.testing.assert_close(one, (h[:1] @ w.T).log_softmax(-1)[0, target[0]][None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_equal_targets_of_one_row_add_up(backend):
    h, w, _, _ = problem(2, 8, 40, 0)
    target = torch.tensor([3, 3, 3, 7, 3, 9, 39])
    compare(h, w, target, torch.tensor([1, 1, 1, 1, 0, 1, 1]), backend=backend, tolerance=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend):
    h, w, target, _ = problem(8, 6, 23, 8)
    strided_h = torch.stack((h, h), 2).flatten(1)[:, ::2]
    strided_w = torch.stack((w, w), 2).flatten(1)[:, ::2]
    assert not strided_h.is_contiguous()
    torch.testing.assert_close(
        linear_logprob(strided_h, strided_w, target, backend=backend).logprobs_K,
        linear_logprob(h, w, target, backend=backend).logprobs_K,
    )
    expanded = h[:1].clone().requires_grad_().expand(8, 6)
    logprobs = linear_logprob(expanded, w, target[:1].expand(8), backend=backend).logprobs_K
    (grad,) = torch.autograd.grad(logprobs.sum(), expanded)  # the upstream gradient is an expanded scalar
    assert grad.any()
    torch.testing.assert_close(grad, grad[:1].expand(8, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_operands_give_fp32_results(backend):
    """Logits of 30: in bf16 they would be off by 0.1."""
    h, w, target, _ = problem(64, 128, 2000, 64, scale=0.8)
    h, w = h.bfloat16(), w.bfloat16()
    target[:32] = (h.float() @ w.float().T).argmax(-1)[:32]
    out = linear_logprob(h, w, target, return_entropy=True, backend=backend)
    oracle, entropy = linear_logprob_dense(h.double(), w.double(), target)
    assert out.logprobs_K.dtype == torch.float32 and last_backend("linear_logprob") == backend
    assert float((h.float() @ w.float().T).abs().max()) > 30
    assert float((out.logprobs_K - oracle).abs().max()) <= 1e-5
    assert out.entropy_K is not None and float((out.entropy_K - entropy).abs().max()) <= 1e-5


def test_bf16_weight_gradient_is_accumulated_in_fp32():
    """256 equal contributions: sums in bf16 would stop growing at 256 times the spacing of the sum."""
    h = torch.ones(512, 2, dtype=torch.bfloat16)
    w = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    logprobs = linear_logprob(h, w, torch.zeros(512, dtype=torch.int64), max_buffer_bytes=4096).logprobs_K
    (grad,) = torch.autograd.grad(logprobs.sum(), w)
    torch.testing.assert_close(grad[0].float(), torch.full((2,), 512 * 2 / 3), rtol=2**-8, atol=0)


def test_gradcheck():
    h, w, target, row = problem(4, 3, 9, 6)
    target[2] = -100
    h, w = h.double().requires_grad_(), w.double().requires_grad_()
    for buffer in (None, 8 * 10):
        assert torch.autograd.gradcheck(
            lambda a, b, buffer=buffer: tuple(
                linear_logprob(
                    a, b, target, row_K=row, return_entropy=True, temperature=0.8, softcap=4.0, max_buffer_bytes=buffer
                )
            ),
            (h, w),
        )


def test_nan_is_not_hidden():
    h, w, target, _ = problem(3, 3, 100, 3)
    h[1] = math.nan
    for backend in BACKENDS:
        logprobs = linear_logprob(h, w, target, backend=backend).logprobs_K
        assert torch.isnan(logprobs).tolist() == [False, True, False]


def test_kept_logits_survive_a_second_backward():
    h, w, target, _ = problem(5, 4, 30, 5)
    h.requires_grad_()
    out = linear_logprob(h, w, target).logprobs_K.sum()
    (first,) = torch.autograd.grad(out, h, retain_graph=True)
    (second,) = torch.autograd.grad(out, h)
    assert torch.equal(first, second)
