"""packed_attention's own flash attention in Triton: against the dense definition in float64.

Runs under the interpreter on the CPU and, where there is a GPU, on that. Tiles of 16 rows let small packs have many.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.attention_cases import CU, DEVICE, PREFIX, SMALL, compare, make_plan, oracle, run, tensors
from tulu_hpc.kernels import BackendError, packed_attention
from tulu_hpc.kernels.packed_attention import ops, select, triton_backend, triton_plan
from tulu_hpc.kernels.packed_attention.reference import forward, visible
from tulu_hpc.kernels.packed_attention.triton_plan import EVERY, tables

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "tiles", lambda head_dim, dtype, permuted: SMALL)


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]]]:
    """[prompts | ordinary | responses] with segments of any length, zero and one included."""
    prompts = draw(st.lists(st.integers(1, 20), max_size=2))
    ordinary = draw(st.lists(st.integers(0, 35), max_size=2))
    responses = [(i, n) for i in range(len(prompts)) for n in draw(st.lists(st.integers(0, 18), max_size=3))]
    cu = [0, *itertools.accumulate([*prompts, *ordinary, *[n for _, n in responses]])]
    return cu, [(0, 0)] * (len(prompts) + len(ordinary)) + [(cu[i], cu[i + 1]) for i, _ in responses]


@pytest.mark.usefixtures("small_tiles")
@settings(
    max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)  # shrinking takes minutes in the interpreter
@given(
    pack=packs(),
    heads=st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    head_dim=st.sampled_from([3, 16]),
    cut=st.floats(0, 1),
    ranges=st.booleans(),
    reorder=st.booleans(),
    seed=st.integers(0, 100),
)
def test_against_the_definition(pack, heads, head_dim, cut, ranges, reorder, seed):
    cu, prefix = pack
    middle = int(cut * cu[-1])
    plan = make_plan(
        cu,
        prefix,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        ranges=[(middle, cu[-1]), (0, middle // 2)] if ranges else None,
        key_order=torch.randperm(cu[-1], generator=torch.Generator().manual_seed(seed)) if reorder else None,
    )
    compare(plan, torch.float32, 1e-5, seed=seed)


@pytest.mark.parametrize("ranges", [None, [(60, 88), (5, 30)]])
@pytest.mark.usefixtures("small_tiles")
def test_split_key_tiles(ranges, monkeypatch):
    """A prompt's queries divided over programs: the parts are added in a fixed order; also with permuted keys."""
    monkeypatch.setattr(triton_plan, "SPLIT_ROWS", 5)
    order = torch.randperm(88, generator=torch.Generator().manual_seed(1))
    plan = make_plan(CU, PREFIX, ranges=ranges, key_order=None if ranges is None else order)
    compare(plan, torch.float32, 1e-5)
    table = tables(plan, SMALL)
    assert table.slots > len(table.splits) > 0
    # Without the split the same visits are made.
    rows = lambda t: int((t.visits[:, 1] - t.visits[:, 0]).sum())  # noqa: E731
    monkeypatch.undo()
    whole = tables(make_plan(CU, PREFIX, ranges=ranges, key_order=plan.key_order), SMALL)
    assert whole.slots == 0 and rows(whole) == rows(table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_tiles_that_ship(head_dim, dtype):
    """Production tile sizes at few rows; bf16 and fp16 within their rounding, which the flash libraries have too."""
    order = torch.arange(10, -1, -1) if dtype == torch.float16 else None
    plan = make_plan([0, 5, 9, 11], [(0, 0), (0, 5), (0, 5)], head_dim=head_dim, key_order=order)
    compare(plan, dtype, {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype])


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.usefixtures("small_tiles")
def test_many_query_heads_on_a_key_head(group):
    compare(make_plan([0, 5, 9], [(0, 0), (0, 5)], heads=2 * group, kv_heads=2), torch.float32, 1e-5)


@pytest.mark.parametrize("scale", [300.0, -300.0, 0.0])
@pytest.mark.usefixtures("small_tiles")
def test_extreme_scores(scale):
    """Scores of +-1e4 are rounded to about 1e-3 in fp32, wherever they are computed; nothing may overflow."""
    plan = make_plan([0, 5, 24, 31], [(0, 0), (0, 5), (0, 5)])
    q, k, v, grad = tensors(plan, torch.float32)
    if scale:
        assert float((torch.einsum("tnd,mkd->tnm", q, k) * scale).abs().max()) > 3000
    found, want = run(plan, [q, k, v, grad], scale=scale), oracle(plan, [q, k, v, grad], scale=scale)
    torch.testing.assert_close(found[0].double(), want[0], rtol=0, atol=5e-3)
    for mine, right in zip(found[1:], want[1:]):
        torch.testing.assert_close(mine.double(), right, rtol=5e-3, atol=5e-3)


@pytest.mark.usefixtures("small_tiles")
def test_one_key_takes_all():
    """Equal scores, then one of 1e4: exact probabilities."""
    plan = make_plan([0, 4, 8], [(0, 0), (0, 4)], heads=1)
    q, k, v, grad = tensors(plan, torch.float32)
    equal = run(plan, [q, torch.ones_like(k), v, grad])
    want = oracle(plan, [q, torch.ones_like(k), v, grad])
    for mine, right in zip(equal, want):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)
    q, k = torch.ones_like(q), torch.zeros_like(k)
    k[2] = 1e4
    out = run(plan, [q, k, v, grad])[0]
    torch.testing.assert_close(out[2:], v[2:3].expand_as(out[2:]), rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_the_log_sum_exp():
    """fp32, [T, N], natural: the contract of the other backends, any of whose backward passes may take it."""
    plan = make_plan(CU, PREFIX, heads=2)
    q, k, v, grad = tensors(plan, torch.float32)
    out, lse = torch.ops.tulu_hpc.packed_attention(q, k, v, plan.handle, 0.25, "triton")
    want_out, want = forward(q.double(), k.double(), v.double(), plan, 0.25)
    assert lse.dtype == torch.float32 and lse.shape == (plan.num_queries, 2)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=1e-5)
    mixed = torch.ops.tulu_hpc.packed_attention_backward(grad, q, k, v, out, lse, plan.handle, 0.25, "triton")
    other = torch.ops.tulu_hpc.packed_attention_backward(grad, q, k, v, out, lse, plan.handle, 0.25, "reference")
    for mine, right in zip(mixed, other):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_give_the_same_bits():
    plan = make_plan(CU, PREFIX, heads=2)
    inputs = tensors(plan, torch.bfloat16)
    for a, b in zip(run(plan, inputs), run(plan, inputs)):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("small_tiles")
def test_a_group_computes_the_same_bits_in_any_pack():
    """No tile crosses a segment: same outputs and gradients alone and beside others."""
    alone = make_plan([0, 6, 26, 46], [(0, 0), (0, 6), (0, 6)])
    inputs = tensors(alone, torch.float32)
    beside = make_plan([0, 6, 13, 33, 53], [(0, 0), (0, 0), (0, 6), (0, 6)])
    wide = [torch.cat((x[:6], torch.randn(7, *x.shape[1:], device=DEVICE), x[6:])) for x in inputs]
    for a, b in zip(run(alone, inputs), run(beside, wide)):
        assert torch.equal(a, torch.cat((b[:6], b[13:])))


@pytest.mark.usefixtures("small_tiles")
def test_equals_the_expanded_layout():
    """A shared prompt's outputs are those of each copy, its gradients their sum."""
    prompt, responses = 18, (7, 0, 21)
    cu = [0, *itertools.accumulate([prompt, *responses])]
    shared = make_plan(cu, [(0, 0)] + [(0, prompt)] * 3)
    expanded = make_plan([0, *itertools.accumulate(prompt + n for n in responses)])
    take = torch.cat([torch.cat((torch.arange(prompt), torch.arange(a, b))) for a, b in itertools.pairwise(cu[1:])])
    take = take.to(DEVICE)
    q, k, v, grad = tensors(shared, torch.float32)
    copies = grad[take].clone()
    copies[prompt + responses[0] :][: 2 * prompt] = 0  # the prompt's own gradient once
    copies[-(prompt + responses[2]) : -responses[2]] = 0
    mine = run(shared, [q, k, v, grad])
    theirs = run(expanded, [q[take], k[take], v[take], copies])
    torch.testing.assert_close(mine[0][take], theirs[0], rtol=0, atol=2e-6)
    for a, b in zip(mine[1:], theirs[1:]):
        torch.testing.assert_close(a, torch.zeros_like(a).index_add_(0, take, b), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_empty_and_single():
    for cu, options in (([0], {}), ([0, 0, 4, 4], {"ranges": [(2, 2)]}), ([0, 1], {})):
        compare(make_plan(cu, **options), torch.float32, 1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_strided_and_expanded_inputs():
    plan = make_plan([0, 6, 10], [(0, 0), (0, 6)])
    q, k, v, _ = tensors(plan, torch.float32)
    wide = torch.stack((q, q), -1).flatten(2)[..., ::2].requires_grad_()
    out = packed_attention(wide, k, v, plan, backend="triton")
    torch.testing.assert_close(out, packed_attention(q, k, v, plan, backend="triton"))
    (grad,) = torch.autograd.grad(out.sum(), wide)  # an expanded upstream gradient
    want = oracle(plan, [q, k, v, torch.ones_like(q)])[1]
    torch.testing.assert_close(grad.double(), want, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_opcheck_and_compile():
    plan = make_plan([0, 3, 5], [(0, 0), (0, 3)], heads=1)
    q, k, v, _ = tensors(plan, torch.float32)
    q.requires_grad_()
    torch.library.opcheck(torch.ops.tulu_hpc.packed_attention.default, (q, k, v, plan.handle, 0.5, "triton"))

    def loss(x: Tensor) -> Tensor:
        return packed_attention(x, k, v, plan, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q), torch.autograd.grad(loss(q), q))


def test_every_pair_is_in_the_tables_once():
    """The visits of the key tiles make the mask of the definition, each pair once."""
    for ranges in (None, [(60, 88), (5, 30)]):
        plan = make_plan(CU, PREFIX, ranges=ranges)
        table = tables(plan, SMALL)
        count = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.int64)
        written = torch.zeros(plan.num_keys, dtype=torch.int64)
        for start, stop, low, high, _ in table.parts.tolist():
            written[start:stop] += 1
            for first, last, shift in table.visits[low:high].tolist():
                queries, keys = torch.arange(first, last)[:, None], torch.arange(start, stop)[None]
                assert shift < EVERY or bool((queries + shift > keys).all())
                count[first:last, start:stop] += (keys <= queries + shift).long()
        assert torch.equal(count, visible(plan, torch.device("cpu")).long())
        assert torch.equal(written, torch.ones_like(written))
        assert tables(plan, SMALL) is table


def test_errors_and_choice(monkeypatch):
    plan = make_plan([0, 5], head_dim=8)
    q, k, v, _ = tensors(plan, torch.float64)
    with pytest.raises(BackendError, match=r"'triton' takes bfloat16, float16 or float32 .* got torch.float64 with 8"):
        packed_attention(q, k, v, plan, backend="triton")
    assert triton_backend.refusal(torch.bfloat16, 264) is not None
    # What runs on CUDA, without one: the probes say usable.
    monkeypatch.setattr(select.triton_support, "status", lambda: "usable")
    for dtype, head_dim, backend in (
        (torch.bfloat16, 64, "flash"),
        (torch.float16, 256, "flash"),
        (torch.float32, 64, "triton"),
        (torch.bfloat16, 12, "triton"),
        (torch.bfloat16, 264, "reference"),
        (torch.float64, 64, "reference"),
    ):
        assert select.default("cuda", dtype, head_dim).backend == backend
        assert select.default("cuda", dtype, head_dim).warn is (backend == "reference")
    assert select.default("cpu", torch.float32, 64).backend == "cpu"
    monkeypatch.setattr(select.triton_support, "status", lambda: "triton is not installed")
    ops._say_dense.cache_clear()
    with pytest.warns(UserWarning, match=r"dense reference runs.*got torch.float32.*triton is not installed"):
        assert ops._default_choice("cuda", torch.float32, 64) == "reference"


def test_description(monkeypatch):
    plan = make_plan(CU, PREFIX, heads=4, kv_heads=1)
    text = plan.describe(torch.float32, "triton")
    assert "88 query rows on 88 key rows" in text and "backend   triton: named in the call" in text
    monkeypatch.setenv("TULU_HPC_PACKED_ATTENTION_BACKEND", "reference")
    assert "reference: named by TULU_HPC_PACKED_ATTENTION_BACKEND" in plan.describe()
    assert "it will raise: there is no such backend" in plan.describe(backend="none")
    assert "it will raise: takes bfloat16" in plan.describe(torch.float64, "triton")
    monkeypatch.setenv("TULU_HPC_PACKED_ATTENTION_STRATEGY", "merge")
    forced = make_plan(CU, PREFIX, heads=4, kv_heads=1)
    assert forced.strategy == "merge" and plan.strategy == "repeat"
    assert "merge: named by TULU_HPC_PACKED_ATTENTION_STRATEGY" in forced.describe(backend="cpu")
    assert "key rows is" in plan.describe(backend="cpu")
    assert make_plan(CU, PREFIX, strategy="repeat").strategy_reason == "named in the call"
    monkeypatch.setenv("TULU_HPC_PACKED_ATTENTION_STRATEGY", "glue")
    with pytest.raises(ValueError, match="strategy must be one of"):
        make_plan(CU, PREFIX)
    flash_text = plan.describe(backend="flash")
    assert "copies    " in flash_text and "merge     " in flash_text
    assert "library   by compute capability, best first: 8.x fa2, aten; 9.x fa3, fa4, aten, fa2;" in flash_text
