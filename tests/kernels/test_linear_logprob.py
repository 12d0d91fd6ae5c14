"""linear_logprob on one process: every backend against the definition in float64.

Not proved here: the CUDA row kernels' results (no device in CI); test_native.py checks that they are compiled.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tulu_hpc.kernels import BackendError, available_backends, last_backend, linear_logprob
from tulu_hpc.kernels.linear_logprob import blocks
from tulu_hpc.kernels.linear_logprob.cpu import CpuRows
from tulu_hpc.kernels.linear_logprob.reference import ReferenceRows, linear_logprob_dense
from tulu_hpc.kernels.native import core

BACKENDS = ["reference", "cpu"]


def problem(
    rows: int, hidden: int, vocab: int, targets: int, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator) * scale
    w = torch.randn(vocab, hidden, generator=generator)
    target = torch.randint(0, vocab, (targets,), generator=generator)
    row = torch.randint(0, max(rows, 1), (targets,), generator=generator)
    return h, w, target, row


def values_and_gradients(function, h, w, grads, **arguments):
    """(logprobs, entropy, dh, dw) in float64."""
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    logprobs, entropy = function(h, w, **arguments)
    loss = (logprobs * grads[0].to(logprobs.dtype)).sum() + (entropy * grads[1].to(entropy.dtype)).sum()
    dh, dw = torch.autograd.grad(loss, (h, w))
    return [x.detach().double() for x in (logprobs, entropy, dh, dw)]


def compare(h, w, target, row=None, *, backend, tolerance, seed=7, **arguments):
    """Ours on fp32 copies against the definition in fp64; gradients relative to their largest element."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(2, len(target), generator=generator)
    buffer = arguments.pop("max_buffer_bytes", None)
    ours = values_and_gradients(
        lambda a, b, **kw: linear_logprob(
            a, b, target, row_K=row, return_entropy=True, backend=backend, max_buffer_bytes=buffer, **kw
        ),
        h,
        w,
        grads,
        **arguments,
    )
    oracle = values_and_gradients(
        lambda a, b, **kw: linear_logprob_dense(a, b, target, row, **kw), h.double(), w.double(), grads, **arguments
    )
    assert last_backend("linear_logprob") == backend
    for name, mine, want in zip(("logprobs", "entropy", "d hidden", "d weight"), ours, oracle):
        bound = tolerance * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        error = float((mine - want).abs().max()) if want.numel() else 0.0
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    return ours


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
                *_sorted(h, w, target, row), 1.0, 0.0, 0, 2**28, False, False, "cpu", "", False
            )
            results.append(stats)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def _sorted(h, w, target, row):
    """Arguments of the op: rows to use, targets in row order."""
    row, order = row.sort(stable=True)
    rows, counts = row.unique_consecutive(return_counts=True)
    return h, w, target[order], torch.nn.functional.pad(counts.cumsum(0), (1, 0)), rows


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
    expanded = h[:1].expand(8, 6).clone().requires_grad_()
    logprobs = linear_logprob(expanded, w, target[:1].expand(8), backend=backend).logprobs_K
    (grad,) = torch.autograd.grad(logprobs.sum(), expanded)  # the upstream gradient is an expanded scalar
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


@pytest.fixture
def gemms(monkeypatch):
    """(rows, inner, columns) of every matrix product of the block loop: a dispatch mode does not see inside an op."""
    seen: list[tuple[int, int, int]] = []
    for name in ("gemm", "gemm_add"):
        original = getattr(blocks.Problem, name)

        def counted(self, *operands, original=original, adds=name == "gemm_add"):
            a, b = operands[1:] if adds else operands[:2]
            seen.append((a.shape[0], a.shape[1], b.shape[1]))
            original(self, *operands)

        monkeypatch.setattr(blocks.Problem, name, counted)
    return seen


def flops(seen: list[tuple[int, int, int]]) -> int:
    return sum(2 * m * k * n for m, k, n in seen)


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


def test_no_buffer_beyond_the_limit():
    """The block loops on the C++ row passes, called directly: a dispatch mode does not see inside an op."""
    rows, hidden, vocab = 64, 16, 5000
    limit = rows * 1500 * 4
    assert limit > vocab * hidden * 4, "the weight gradient must be below the limit for this test to see anything"
    h, w, target, _ = problem(rows, hidden, vocab, rows)
    record, kernels = blocks.Problem(h, w, target, torch.arange(rows + 1), 1.0, 0.0, 0, limit), CpuRows()
    with Largest() as seen:
        stats, kept = blocks.forward(record, kernels, True)
        blocks.backward(record, kernels, stats, torch.ones_like(stats), kept, True, True, lambda grad: None)
    assert kept.numel() == 0 and seen.bytes <= limit < rows * vocab * 4
    # A limit below one row of logits still holds.
    small = blocks.plan_blocks(rows, vocab, 4, 400, False)
    assert (small.rows, small.columns, small.keep) == (1, 100, False)


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


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kept_rows", [4, 2048])
def test_kept_logits_of_bf16_operands(zeros, kept_rows, monkeypatch):
    """The products that a GPU runs, here by torch's bf16 GEMM on the CPU."""
    rows, vocab = 30, 90
    h, w, target, _ = problem(rows, 8, vocab, rows)
    h, w = h.bfloat16(), w.bfloat16()
    monkeypatch.setattr(blocks, "KEPT_ROWS", kept_rows)
    monkeypatch.setattr(blocks.Problem, "half_gemm", True)
    monkeypatch.setattr(blocks.Problem, "gemm", lambda self, a, b, out: torch.mm(a.float(), b.float(), out=out))
    record = blocks.Problem(h, w, target, torch.arange(rows + 1), 1.0, 0.0, 0, 2**20)
    stats, kept = blocks.forward(record, ReferenceRows(), True)
    assert kept.shape == (rows, vocab)
    grad = torch.zeros(rows, 4)
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    if zeros:
        weights[::3] = 0
    grad[:, 1], grad[:, 3] = -weights, weights
    done: list[Tensor] = []
    grad_weight = blocks.backward(record, ReferenceRows(), stats, grad, kept, True, True, done.append)
    a, b = h.double().requires_grad_(), w.double().requires_grad_()
    logprobs, _ = linear_logprob_dense(a, b, target)
    wanted = torch.autograd.grad((logprobs * weights).sum(), (a, b))
    assert len(done) == 1
    for mine, want in zip((done[0], grad_weight), wanted):
        assert mine.dtype == torch.bfloat16
        assert float((mine.double() - want).norm() / want.norm()) < 6e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_at_all(backend, gemms):
    h, w, target, row = problem(5, 4, 30, 9)
    h, w = h.requires_grad_(), w.requires_grad_()
    logprobs = linear_logprob(h, w, target, row_K=row, backend=backend).logprobs_K
    gemms.clear()
    grads = torch.autograd.grad((logprobs * 0.0).sum(), (h, w))
    assert not gemms and not grads[0].any() and not grads[1].any()


def test_kept_logits_survive_a_second_backward():
    h, w, target, _ = problem(5, 4, 30, 5)
    h.requires_grad_()
    out = linear_logprob(h, w, target).logprobs_K.sum()
    (first,) = torch.autograd.grad(out, h, retain_graph=True)
    (second,) = torch.autograd.grad(out, h)
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("buffer", [2**20, 4 * 7])
def test_opcheck(backend, buffer):
    h, w, target, row = problem(5, 4, 30, 9)
    arguments = _sorted(h.requires_grad_(), w.requires_grad_(), target, row)
    constants, last = (1.0, 0.0, 0, buffer), (backend, "", False)
    torch.library.opcheck(torch.ops.tulu_hpc.linear_logprob_stats.default, (*arguments, *constants, True, False, *last))
    with torch.no_grad():
        stats, kept, gathered = torch.ops.tulu_hpc.linear_logprob_stats(*arguments, *constants, True, False, *last)
        arguments = tuple(x.detach() for x in arguments)
        torch.library.opcheck(
            torch.ops.tulu_hpc.linear_logprob_stats_backward.default,
            (torch.randn_like(stats), stats, kept, gathered, *arguments, *constants, True, True, *last),
        )


@pytest.mark.parametrize("with_rows", [False, True])
def test_compiles_without_graph_breaks(with_rows):
    h, w, target, row = problem(9, 4, 30, 9)
    target[3] = -100
    row = row if with_rows else None

    def loss(a, b):
        out = linear_logprob(a, b, target, row_K=row, return_entropy=True)
        return out.logprobs_K.sum() + 0.3 * out.entropy_K.sum()

    h, w = h.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, w), loss(h, w))
    mine = torch.autograd.grad(compiled(h, w), (h, w))
    torch.testing.assert_close(mine, torch.autograd.grad(loss(h, w), (h, w)), rtol=1e-5, atol=1e-6)


def _some_rows(rows: int, generator: torch.Generator) -> Tensor:
    count = int(torch.randint(1, rows + 1, (1,), generator=generator))
    return torch.randint(0, rows, (count,), generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden, vocab", [(5, 7), (16, 70), (33, 1001), (64, 4200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance_is_bitwise(backend, hidden, vocab, dtype):
    """A row alone, and in calls of every size and order, with other targets, ignored rows and buffers."""
    rows = 70 if backend == "cpu" else 9
    h, w, target, _ = problem(rows, hidden, vocab, rows)
    h, w = h.to(dtype), w.to(dtype)
    options = {"return_entropy": True, "batch_invariant": True, "backend": backend, "temperature": 0.9}
    whole = linear_logprob(h, w, target, **options)
    assert last_backend("linear_logprob") == backend
    oracle, _ = linear_logprob_dense(h.double(), w.double(), target, temperature=0.9)
    torch.testing.assert_close(whole.logprobs_K.double(), oracle, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(vocab)

    def check(choice: Tensor, **changes) -> None:
        some = linear_logprob(h[choice], w, target[choice], **options, **changes)
        assert torch.equal(some.logprobs_K, whole.logprobs_K[choice])
        assert some.entropy_K is not None and torch.equal(some.entropy_K, whole.entropy_K[choice])

    for row in (0, 1, rows - 1):
        check(torch.tensor([row]))
    for count in range(1, rows + 1, 7 if backend == "cpu" else 1):
        check(torch.arange(count))
    for _ in range(6):
        check(_some_rows(rows, generator), max_buffer_bytes=2 * 2**20)
    check(torch.randperm(rows, generator=generator))
    # Other targets on the same rows, one of them ignored; kept logits.
    order = torch.randint(0, rows, (2 * rows,), generator=generator)
    ids = target[order].index_fill(0, torch.tensor([0]), -100)
    mixed = linear_logprob(h.clone().requires_grad_(), w, ids, row_K=order, **options)
    assert torch.equal(mixed.logprobs_K[1:], whole.logprobs_K[order][1:]) and not mixed.logprobs_K[0].any()


def test_batch_invariance_does_not_depend_on_the_data_of_the_other_rows():
    h, w, target, _ = problem(64, 48, 500, 64)
    alone = linear_logprob(h[3:4], w, target[3:4], batch_invariant=True, backend="cpu").logprobs_K
    h[:3], h[4:] = 1e4, -1e4
    among = linear_logprob(h, w, target, batch_invariant=True, backend="cpu").logprobs_K
    assert torch.equal(among[3:4], alone)


def test_batch_invariant_gradients_are_right():
    h, w, target, row = problem(6, 5, 70, 9)
    generator = torch.Generator().manual_seed(7)
    grads = torch.randn(2, 9, generator=generator)
    for backend in BACKENDS:
        for buffer in (None, 64 * 128 * 4):
            mine, oracle = (
                values_and_gradients(function, x, y, grads)
                for function, x, y in (
                    (
                        lambda a, b, backend=backend, buffer=buffer: linear_logprob(
                            a,
                            b,
                            target,
                            row_K=row,
                            return_entropy=True,
                            batch_invariant=True,
                            backend=backend,
                            max_buffer_bytes=buffer,
                        ),
                        h,
                        w,
                    ),
                    (lambda a, b: linear_logprob_dense(a, b, target, row), h.double(), w.double()),
                )
            )
            torch.testing.assert_close(mine, oracle, rtol=1e-4, atol=1e-5)


def test_batch_invariance_that_cannot_be_kept_is_refused(monkeypatch):
    h, w, target, _ = problem(4, 3, 9, 4)
    with pytest.raises(ValueError, match="batch_invariant needs max_buffer_bytes of 16384"):
        linear_logprob(h, w, target, batch_invariant=True, max_buffer_bytes=16000)
    monkeypatch.setattr(CpuRows, "invariant_rows", None)
    with pytest.raises(BackendError, match="'cpu' offers no batch_invariant"):
        linear_logprob(h, w, target, batch_invariant=True)


def test_errors_name_what_is_wrong():
    h, w, target, _ = problem(4, 3, 9, 4)
    with pytest.raises(ValueError, match=r"\[T, H\]"):
        linear_logprob(h, w[:, :2], target)
    with pytest.raises(TypeError, match="float16"):
        linear_logprob(h.half(), w.half(), target)
    with pytest.raises(TypeError, match="both"):
        linear_logprob(h, w.double(), target)
    with pytest.raises(TypeError, match="int64"):
        linear_logprob(h, w, target.int())
    with pytest.raises(TypeError, match="row_K"):
        linear_logprob(h, w, target, row_K=target[:2])
    with pytest.raises(ValueError, match="give row_K"):
        linear_logprob(h, w, target[:3])
    with pytest.raises(ValueError, match=r"row_K holds .*4"):
        linear_logprob(h, w, target, row_K=torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="target 9 lies outside"):
        linear_logprob(h, w, torch.tensor([0, 1, 9, 3]))
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(h, w, target, temperature=0.0)
    with pytest.raises(ValueError, match="does not hold one logit"):
        linear_logprob(h, w, target, max_buffer_bytes=2)
    with pytest.raises(BackendError, match="no backend 'tritone'"):
        linear_logprob(h, w, target, backend="tritone")
    with pytest.raises(BackendError, match="float64"):
        linear_logprob(h.double(), w.double(), target, backend="cpu")
    if available_backends("linear_logprob")["cuda"] != "usable":
        with pytest.raises(BackendError, match="CUDA"):
            linear_logprob(h, w, target, backend="cuda")


def test_backend_can_be_set_by_environment(monkeypatch):
    h, w, target, _ = problem(4, 3, 9, 4)
    linear_logprob(h, w, target)
    assert last_backend("linear_logprob") == "cpu"
    monkeypatch.setenv("TULU_HPC_LINEAR_LOGPROB_BACKEND", "reference")
    linear_logprob(h, w, target)
    assert last_backend("linear_logprob") == "reference"


def test_nan_is_not_hidden():
    h, w, target, _ = problem(3, 3, 100, 3)
    h[1] = math.nan
    for backend in BACKENDS:
        logprobs = linear_logprob(h, w, target, backend=backend).logprobs_K
        assert torch.isnan(logprobs).tolist() == [False, True, False]
