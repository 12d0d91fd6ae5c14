"""The fused Triton kernels of linear_logprob, in the interpreter or on a GPU, against the definition in float64."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.linear_logprob_cases import compare, problem
from tulu_hpc.kernels import BackendError, last_backend, linear_logprob, triton_support
from tulu_hpc.kernels.linear_logprob.reference import linear_logprob_dense

if triton_support.status() != "usable":
    pytest.skip(triton_support.status(), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Not shrunk: the interpreter is slow, and a failing example is small already.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    rows=st.integers(1, 80),
    hidden=st.sampled_from([1, 5, 32, 48]),
    vocab=st.integers(1, 200),
    targets=st.integers(0, 90),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    softcap=st.sampled_from([None, 3.0]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_against_the_definition(rows, hidden, vocab, targets, temperature, softcap, ignored, seed):
    h, w, target, row = (x.to(DEVICE) for x in problem(rows, hidden, vocab, targets, seed))
    target[torch.rand(targets, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < ignored] = -100
    compare(h, w, target, row, backend="triton", tolerance=1e-5, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_several_splits_rows_and_tiles(softcap, monkeypatch):
    """More than two splits, the last ragged; owners with several blocks; one row with 7 targets."""
    from tulu_hpc.kernels.linear_logprob import triton_kernels

    monkeypatch.setattr(triton_kernels, "SPLIT_COLUMNS", 128)
    h, w, target, row = (x.to(DEVICE) for x in problem(70, 33, 300, 80, scale=0.5))
    row[:7] = 69
    target[:4] = torch.tensor([0, 299, 128, 127])
    compare(h, w, target, row, backend="triton", tolerance=1e-5, softcap=softcap, temperature=0.9)


def test_bf16_operands():
    """fp32 results at |logit| of 30 and more; gradients are rounded to bf16 (the interpreter truncates them)."""
    h, w, target, _ = problem(130, 128, 700, 130, scale=1.3)
    h, w, target = h.bfloat16().to(DEVICE), w.bfloat16().to(DEVICE), target.to(DEVICE)
    assert float((h.float() @ w.float().T).abs().max()) > 30
    results = []
    for kind in ("triton", "definition"):
        dtype = torch.bfloat16 if kind == "triton" else torch.float64
        a, b = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        if kind == "triton":
            logprobs = linear_logprob(a, b, target, backend="triton").logprobs_K
            assert last_backend("linear_logprob") == "triton" and logprobs.dtype == torch.float32
        else:
            logprobs, _ = linear_logprob_dense(a, b, target)
        grads = torch.autograd.grad(logprobs.sum(), (a, b))
        results.append((logprobs.detach().double(), *(x.double() for x in grads)))
    (logprobs, dh, dw), (want, want_dh, want_dw) = results
    assert float((logprobs - want).abs().max()) <= 1e-5
    for mine, oracle in ((dh, want_dh), (dw, want_dw)):
        assert float((mine - oracle).norm() / oracle.norm()) < (8e-3 if triton_support.interpreting() else 4e-3)


@pytest.mark.parametrize("magnitude", [30.0, 1e4])
def test_extreme_logits(magnitude):
    generator = torch.Generator().manual_seed(1)
    w = (torch.rand(501, 1, generator=generator) * 2 - 1) * magnitude
    w[0], w[1] = magnitude, -magnitude
    logprobs, entropy, _, _ = compare(
        torch.ones(4, 1, device=DEVICE),
        w.to(DEVICE),
        torch.tensor([0, 1, 2, 3], device=DEVICE),
        backend="triton",
        tolerance=1e-5,
    )
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()


def test_equal_and_one_hot_logits():
    h, target = torch.ones(1, 1, device=DEVICE), torch.tensor([5], device=DEVICE)
    equal = linear_logprob(h, torch.full((70, 1), -1e4, device=DEVICE), target, return_entropy=True, backend="triton")
    assert float(equal.logprobs_K) == pytest.approx(-math.log(70), abs=1e-6)
    assert equal.entropy_K is not None and float(equal.entropy_K) == pytest.approx(math.log(70), abs=1e-6)
    weight = torch.zeros(70, 1, device=DEVICE)
    weight[5] = 1e4
    one_hot = linear_logprob(h, weight, target, return_entropy=True, backend="triton")
    assert float(one_hot.logprobs_K) == 0.0
    assert one_hot.entropy_K is not None and float(one_hot.entropy_K) == 0.0


def test_empty_ignored_expanded_and_nan():
    h, w, target, _ = (x.to(DEVICE) for x in problem(3, 4, 11, 3))
    h.requires_grad_()
    ignored = linear_logprob(h, w, torch.full_like(target, -100), return_entropy=True, backend="triton")
    assert ignored.logprobs_K.tolist() == [0, 0, 0]
    (grad,) = torch.autograd.grad(ignored.logprobs_K.sum(), h)
    assert not grad.any()
    nothing = target[:0]
    assert linear_logprob(h, w, nothing, row_K=nothing, backend="triton").logprobs_K.shape == (0,)
    wide = torch.randn(11, 8, device=DEVICE)[:, ::2]
    same = linear_logprob(h[:1].expand(3, 4), wide, target[:1].expand(3), backend="triton").logprobs_K
    assert torch.equal(same, same[:1].expand(3))
    broken = h.detach().clone()
    broken[1] = math.nan
    logprobs = linear_logprob(broken, w, target, backend="triton").logprobs_K
    assert torch.isnan(logprobs).tolist() == [False, True, False]


def test_rows_without_a_gradient_enter_no_backward_kernel(monkeypatch):
    from tulu_hpc.kernels.linear_logprob import triton_kernels

    seen: list[int] = []
    original = triton_kernels.drop_zero_rows

    def watched(*arguments):
        fewer = original(*arguments)
        seen.append(fewer[0].rows)
        return fewer

    monkeypatch.setattr(triton_kernels, "drop_zero_rows", watched)
    h, w, target, _ = (x.to(DEVICE) for x in problem(12, 4, 30, 12))
    h, w = h.requires_grad_(), w.requires_grad_()
    weights = torch.arange(12.0, device=DEVICE) * (torch.arange(12, device=DEVICE) % 3 == 0)
    grads = [
        torch.autograd.grad((linear_logprob(h, w, target, backend=name).logprobs_K * weights).sum(), (h, w))
        for name in ("triton", "reference")
    ]
    assert seen == [3]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_backward_is_deterministic():
    h, w, target, row = (x.to(DEVICE) for x in problem(40, 8, 90, 50))
    h, w = h.requires_grad_(), w.requires_grad_()
    first, second = (
        torch.autograd.grad(linear_logprob(h, w, target, row_K=row, backend="triton").logprobs_K.sum(), (h, w))
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_batch_invariance_is_bitwise():
    """A row alone, and in calls of several sizes and orders, across the edge of a row block (64 rows in fp32)."""
    rows = 70
    h, w, target, _ = (x.to(DEVICE) for x in problem(rows, 33, 150, rows))
    if triton_support.interpreting():
        # numpy's matrix product depends on a row's place, unlike a GPU's: products of such numbers are exact.
        h, w = (h * 4).round() / 4, (w * 4).round() / 4
    options = {"return_entropy": True, "batch_invariant": True, "backend": "triton", "softcap": 5.0}
    whole = linear_logprob(h, w, target, **options)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(rows, generator=generator)
    for choice in (order[:1], order, order[:33], torch.arange(65), torch.full((3,), 69)):
        choice = choice.to(DEVICE)
        some = linear_logprob(h[choice], w, target[choice], **options)
        assert torch.equal(some.logprobs_K, whole.logprobs_K[choice])
        assert some.entropy_K is not None and torch.equal(some.entropy_K, whole.entropy_K[choice])


def test_opcheck_and_compile():
    h, w, target, _ = (x.to(DEVICE) for x in problem(5, 4, 30, 5))
    h, w = h.requires_grad_(), w.requires_grad_()
    arguments = (h, w, target, torch.arange(6, device=DEVICE), None)
    settings = (1.0, 0.0, 0, 2**20, "triton", "", False)
    op = torch.ops.tulu_hpc.linear_logprob_stats
    torch.library.opcheck(op.default, (*arguments, *settings, True, False))
    with torch.no_grad():
        outputs = op(*arguments, *settings, True, False)
    assert outputs[1].numel() == 0
    arguments = tuple(None if x is None else x.detach() for x in arguments)
    torch.library.opcheck(
        torch.ops.tulu_hpc.linear_logprob_stats_backward.default,
        (torch.randn_like(outputs[0]), *outputs, *arguments, *settings, True, True),
    )
    target[3] = -100

    def loss(a, b):
        out = linear_logprob(a, b, target, return_entropy=True, backend="triton")
        return out.logprobs_K.sum() + 0.3 * out.entropy_K.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, w), loss(h, w))
    torch.testing.assert_close(torch.autograd.grad(compiled(h, w), (h, w)), torch.autograd.grad(loss(h, w), (h, w)))


def test_errors(monkeypatch):
    h, w, target, _ = problem(4, 3, 9, 4)
    with pytest.raises(BackendError, match="no float64"):
        linear_logprob(h.double(), w.double(), target, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"CUDA device|tensors of device cpu"):
        linear_logprob(h, w, target, backend="triton")
