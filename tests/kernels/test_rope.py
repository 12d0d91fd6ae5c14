"""rope: both backends against the definition in float64, and against the model's and transformers' own rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.fuzz import close
from tulu_hpc.kernels import BackendError, last_backend
from tulu_hpc.kernels.rope import ops, reference
from tulu_hpc.kernels.rope.ops import rope, rope_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]
pytest.importorskip("triton", reason="triton is not installed")


def problem(rows: int, heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype, seed: int = 0):
    """q, k, position ids in no order, frequencies, and two upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, head_dim), (rows, kv_heads, head_dim)] * 2
    q, k, grad_q, grad_k = (torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes)
    ids = torch.randint(0, 200, (rows,), generator=generator).to(DEVICE)
    frequencies = (500000.0 ** -(torch.arange(half) / max(half, 1))).to(DEVICE)
    return q, k, ids, frequencies, grad_q, grad_k


def run(q: Tensor, k: Tensor, grads: tuple[Tensor, Tensor], *arguments, **options) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = rope(q, k, *arguments, **options)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, (q, k), grads)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 40),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    half=st.sampled_from([1, 3, 8]),
    rest=st.sampled_from([0, 1, 4]),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tables=st.booleans(),
)
def test_against_the_definition(backend, rows, heads, kv_heads, half, rest, interleaved, dtype, tables):
    q, k, ids, frequencies, *grads = problem(rows, heads, kv_heads, 2 * half + rest, half, dtype)
    given = rope_tables(torch.arange(200, device=DEVICE), frequencies) if tables else frequencies
    found = run(q, k, tuple(grads), ids, given, interleaved=interleaved, backend=backend)
    assert last_backend("rope") == backend
    want = run(
        *(q.double(), k.double(), tuple(g.double() for g in grads), ids, frequencies.double()), interleaved=interleaved
    )
    tolerance = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for mine, right in zip(found, want):
        assert mine.dtype == dtype
        close(mine.double(), right, rtol=0, atol=tolerance)


def test_the_definition_is_a_rotation_of_complex_numbers():
    q, k, ids, frequencies, *_ = problem(9, 2, 1, 6, 3, torch.float64)
    turn = torch.polar(torch.ones(9, 3, dtype=torch.float64), ids[:, None] * frequencies.double())[:, None]
    half, paper = (rope(q, k, ids, frequencies.double(), interleaved=flag)[0] for flag in (False, True))
    want = torch.complex(q[..., :3], q[..., 3:]) * turn
    torch.testing.assert_close(half, torch.cat((want.real, want.imag), -1))
    want = torch.view_as_complex(q.unflatten(-1, (3, 2)).contiguous()) * turn
    torch.testing.assert_close(paper, torch.view_as_real(want).flatten(-2))


def test_against_transformers_and_the_model():
    """The half-split convention is that of both, to fp32 rounding; positions of a long context; the model's tables."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from tulu_hpc.models.rope import angles

    q, k, _, frequencies, *_ = (x.cpu() for x in problem(12, 4, 2, 64, 32, torch.float32))
    ids = torch.randint(0, 131072, (12,), generator=torch.Generator().manual_seed(3))
    mine = rope(q, k, ids, frequencies)
    cos, sin = (torch.cat((x, x), -1)[None] for x in rope_tables(ids, frequencies))
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    ours = rope(q, k, None, tuple(angles(ids, frequencies)))
    for out, same, other in zip(mine, ours, theirs):
        torch.testing.assert_close(out, other[0].transpose(0, 1), rtol=0, atol=1e-6)
        assert torch.equal(out, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_views_of_a_fused_projection(backend, dtype):
    """[T, Nk, G, D] views, read where they lie, are the same bits as contiguous [T, N, D]; so are their gradients."""
    rows, groups, group, dim = 19, 2, 3, 8
    _, _, ids, frequencies, *_ = problem(rows, 1, 1, dim, 3, dtype)
    fused = torch.randn(rows, groups, group + 2, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    grads = [torch.randn(rows, n, dim, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype) for n in (6, 2)]

    def gradients(grouped: bool) -> list[Tensor]:
        leaf = fused.clone().requires_grad_()
        q, k, _ = leaf.split((group, 1, 1), 2)
        if not grouped:
            q, k = q.flatten(1, 2).contiguous(), k.contiguous()
        out_q, out_k = rope(q, k.squeeze(2), ids, frequencies, backend=backend)
        assert out_q.is_contiguous() and out_k.is_contiguous() and out_q.shape == q.shape
        out_q = out_q.reshape(rows, -1, dim)
        return [out_q.detach(), out_k.detach(), *torch.autograd.grad((out_q, out_k), leaf, grads)]

    for a, b in zip(gradients(True), gradients(False)):
        assert torch.equal(a, b)
    q, k, _ = fused.requires_grad_().split((group, 1, 1), 2)
    cos, sin = rope_tables(ids, frequencies)
    torch.library.opcheck(torch.ops.tulu_hpc.rope.default, (q, k.squeeze(2), cos, sin, False, False, backend))


def test_cuda_without_triton_says_so(monkeypatch):
    """No CUDA here: the choice is asked for directly."""
    ops._say_plain.cache_clear()
    monkeypatch.setattr(ops.triton_support, "status", lambda: "triton is not installed")
    with pytest.warns(UserWarning, match="plain torch runs on CUDA.*triton is not installed"):
        assert ops._default_on_cuda() == "reference"
    monkeypatch.setattr(ops.triton_support, "status", lambda: "usable")
    assert ops._default_on_cuda() == "triton"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_place(backend):
    """Row t is turned by its id: the same bits wherever it stands. Ids at 0 leave it as it is."""
    q, k, ids, frequencies, *_ = problem(21, 2, 1, 8, 4, torch.float32)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole = rope(q, k, ids, frequencies, backend=backend)
    moved = rope(q[order], k[order], ids[order], frequencies, backend=backend)
    for a, b in zip(whole, moved):
        assert torch.equal(a[order], b)
    same = rope(q, k, torch.zeros_like(ids), frequencies, backend=backend)
    assert torch.equal(same[0], q) and torch.equal(same[1], k)
    table = rope_tables(ids, frequencies)
    for a, b in zip(whole, rope(q, k, None, table, backend=backend)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend):
    q, k, ids, frequencies, *_ = problem(5, 2, 1, 8, 4, torch.float32)
    packed = torch.cat((q, k), 1)  # slices of one projection
    q_view, k_view = packed[:, :2].requires_grad_(), packed[:, 2:].expand(5, 3, 8)
    assert not q_view.is_contiguous()
    found = rope(q_view, k_view, ids, frequencies, backend=backend)
    want = rope(q, k, ids, frequencies, backend="reference")
    torch.testing.assert_close(found[0], want[0])
    torch.testing.assert_close(found[1], want[1].expand(5, 3, 8))
    (grad,) = torch.autograd.grad(found[0].sum(), q_view)
    back = reference.rotate(torch.ones_like(q), *(f * g for f, g in zip((1, -1), rope_tables(ids, frequencies))), False)
    torch.testing.assert_close(grad, back)


def test_gradcheck_opcheck_compile():
    q, k, ids, frequencies, *_ = problem(3, 2, 1, 6, 2, torch.float64)
    q, k = q.requires_grad_(), k.requires_grad_()
    for interleaved in (False, True):
        function = lambda a, b, flag=interleaved: rope(a, b, ids, frequencies.double(), interleaved=flag)  # noqa: E731
        assert torch.autograd.gradcheck(function, (q, k)) and torch.autograd.gradgradcheck(function, (q, k))
    cos, sin = rope_tables(ids, frequencies)
    half = [x.detach().float().requires_grad_() for x in (q, k)]
    for backend in ("reference", "triton"):
        torch.library.opcheck(torch.ops.tulu_hpc.rope.default, (*half, cos, sin, False, False, backend))

    def loss(x: Tensor) -> Tensor:
        return sum(y.square().sin().sum() for y in rope(x, half[1], ids, frequencies))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(half[0]), half[0]), torch.autograd.grad(loss(half[0]), half[0])
    )


def test_errors_name_what_is_wrong():
    q, k, ids, frequencies, *_ = problem(5, 2, 1, 8, 4, torch.float32)
    for match, error, arguments in (
        (r"k is \[4, 1, 8\]", ValueError, (q, k[:4], ids, frequencies)),
        (r"k is torch.float64", TypeError, (q, k.double(), ids, frequencies)),
        (r"q is torch.int64", TypeError, (q.long(), k, ids, frequencies)),
        (r"position_ids is \[4\]", ValueError, (q, k, ids[:4], frequencies)),
        (r"position_ids is torch.float32", TypeError, (q, k, ids.float(), frequencies)),
        (r"need position ids", ValueError, (q, k, None, frequencies)),
        (r"expected \[R / 2\]", ValueError, (q, k, ids, frequencies[None])),
        (r"10 rotated dims for a head dim of 8", ValueError, (q, k, ids, torch.ones(5, device=DEVICE))),
        (r"two \[P, R / 2\]", ValueError, (q, k, ids, (frequencies, frequencies))),
        (r"3 rows for 5 tokens", ValueError, (q, k, None, (torch.ones(3, 4), torch.ones(3, 4)))),
    ):
        with pytest.raises(error, match=match):
            rope(*arguments)
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        rope(q, k, ids, frequencies, backend="cuda")
    with pytest.raises(BackendError, match="float64 needs"):
        rope(q.double(), k.double(), ids, frequencies, backend="triton")
