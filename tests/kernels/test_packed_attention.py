"""packed_attention: backends and strategies against the dense definition in float64.

Not proved here: the `flash` backend's results (no CUDA device in CI); test_attention_libraries runs its calls.
"""

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.fuzz import close
from tulu_hpc.kernels import BackendError, available_backends, last_backend, packed_attention, plan_attention
from tulu_hpc.kernels.packed_attention import flash, ops
from tulu_hpc.kernels.packed_attention.plan import AttentionPlan
from tulu_hpc.kernels.packed_attention.reference import attention_dense, visible


def make_plan(cu, prefix=None, heads=4, kv_heads=2, head_dim=8, **options) -> AttentionPlan:
    return plan_attention(cu, prefix, heads=heads, kv_heads=kv_heads, head_dim=head_dim, device="cpu", **options)


def tensors(plan: AttentionPlan, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (plan.num_queries, plan.heads, plan.head_dim), (plan.num_keys, plan.kv_heads, plan.head_dim)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (queries, keys, keys, queries)
    ]


def run(plan, dtype, backend, seed=0, scale=None):
    q, k, v, grad = tensors(plan, dtype, seed)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = packed_attention(q, k, v, plan, backend=backend, scale=scale)
    assert last_backend("packed_attention") == backend
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def oracle(plan, dtype, seed=0, scale=None):
    """In float64, on the values that `dtype` holds."""
    q, k, v, grad = (x.double() for x in tensors(plan, dtype, seed))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention_dense(q, k, v, plan, plan.head_dim**-0.5 if scale is None else scale)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def compare(plan, dtype, backend, tolerance, **options):
    for mine, want in zip(run(plan, dtype, backend, **options), oracle(plan, dtype, **options)):
        close(mine.double(), want, rtol=0, atol=tolerance)


@st.composite
def packs(draw):
    """[prompts | ordinary | responses] with segments of any length, zero and one included."""
    prompts = draw(st.lists(st.integers(1, 9), max_size=3))
    ordinary = draw(st.lists(st.integers(0, 12), max_size=4))
    responses = [(i, n) for i in range(len(prompts)) for n in draw(st.lists(st.integers(0, 7), max_size=4))]
    lengths = [*prompts, *ordinary, *[n for _, n in responses]]
    cu = [0, *itertools.accumulate(lengths)]
    prefix = [(0, 0)] * (len(prompts) + len(ordinary)) + [(cu[i], cu[i + 1]) for i, _ in responses]
    return cu, prefix


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=40, deadline=None)
@given(
    pack=packs(),
    strategy=st.sampled_from(["repeat", "merge"]),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    cut=st.floats(0, 1),
    reorder=st.booleans(),
    seed=st.integers(0, 100),
)
def test_against_the_definition(backend, pack, strategy, heads, cut, reorder, seed):
    cu, prefix = pack
    middle = int(cut * cu[-1])
    order = torch.randperm(cu[-1], generator=torch.Generator().manual_seed(seed)) if reorder else None
    for ranges in (None, [(middle, cu[-1]), (0, middle // 2)]):
        plan = make_plan(
            cu, prefix, heads=heads[0], kv_heads=heads[1], strategy=strategy, ranges=ranges, key_order=order
        )
        compare(plan, torch.float64, backend, 1e-12, seed=seed)


@pytest.mark.parametrize("strategy", ["repeat", "merge"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fp32_and_bf16(strategy, head_dim):
    cu = [0, 33, 50, 90, 131, 140, 163]
    prefix = [(0, 0)] * 3 + [(0, 33), (0, 33), (33, 50)]
    plan = make_plan(cu, prefix, head_dim=head_dim, strategy=strategy)
    compare(plan, torch.float32, "cpu", 1e-5)
    compare(plan, torch.bfloat16, "cpu", 0.1)


def test_long_and_padded_batches():
    """Segments that are cut into blocks of queries, and several lengths in one padded batch."""
    lengths = [1100, 40, 39, 37, 36, 1, 1030]
    cu = [0, *itertools.accumulate(lengths)]
    plan = make_plan(cu, heads=2, kv_heads=1, head_dim=4)
    (call,) = plan.calls
    assert any(part.batch > 1 and part.place is not None for part in call.padded)
    assert sum(part.batch for part in call.padded) == sum(max(1, length // 64) for length in lengths)
    compare(plan, torch.float64, "cpu", 1e-12)


@pytest.mark.parametrize("strategy", ["repeat", "merge"])
def test_blocks_of_queries(strategy):
    """Segments around the lengths at which a block is added, with and without a prefix; no block sees hidden keys."""
    lengths = [130, 63, 64, 65, 127, 128, 129, 200]
    cu = [0, *itertools.accumulate(lengths)]
    for prefix in (None, [(0, 0)] + [(0, 130)] * 7):
        plan = make_plan(cu, prefix, heads=2, kv_heads=1, head_dim=4, strategy=strategy)
        compare(plan, torch.float64, "cpu", 1e-12)
        compare(plan, torch.float32, "cpu", 1e-5)
        causal = [part for part in plan.calls[0].padded if part.causal or part.mask is not None]
        assert max(part.query_length for part in causal) < 128
        computed = sum(part.batch * part.query_length * part.key_length for part in causal)
        shown = sum(n * (n + 1) // 2 + (n * 130 if prefix and i and strategy == "repeat" else 0)
                    for i, n in enumerate(lengths))  # fmt: skip
        assert shown <= computed < 1.7 * shown


def test_extreme_scores():
    plan = make_plan([0, 5, 12, 20], [(0, 0), (0, 5), (0, 5)])
    for strategy in ("repeat", "merge"):
        plan = make_plan([0, 5, 12, 20], [(0, 0), (0, 5), (0, 5)], strategy=strategy)
        compare(plan, torch.float64, "cpu", 1e-9, scale=300.0)


def test_one_token_and_empty_pack():
    compare(make_plan([0, 1]), torch.float64, "cpu", 1e-12)
    compare(make_plan([0]), torch.float64, "cpu", 0)
    compare(make_plan([0, 0, 4, 4], ranges=[(2, 2)]), torch.float64, "cpu", 0)


def test_a_group_computes_the_same_bits_in_any_pack():
    """Segments do not see each other: same outputs and gradients alone and beside others."""
    alone = make_plan([0, 6, 16, 26], [(0, 0), (0, 6), (0, 6)])
    q, k, v, grad = tensors(alone, torch.float32)
    results = []
    for shift in (0, 8):
        cu = [0, 6, 6 + shift, 16 + shift, 26 + shift]
        plan = make_plan(cu, [(0, 0), (0, 0), (0, 6), (0, 6)])
        widened = [torch.cat((x[:6], torch.randn(shift, *x.shape[1:]), x[6:])) for x in (q, k, v, grad)]
        inputs = [x.requires_grad_() for x in widened[:3]]
        out = packed_attention(*inputs, plan)
        found = [out, *torch.autograd.grad(out, inputs, widened[3])]
        results.append([torch.cat((x[:6], x[6 + shift :])) for x in found])
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_copies_of_a_key_are_summed_in_fp32():
    """128 responses share a prompt: in bf16 the sum of their equal contributions would stop growing."""
    responses = 128
    cu = [0, 1, *range(2, responses + 2)]
    plan = make_plan(cu, [(0, 0)] + [(0, 1)] * responses, heads=1, kv_heads=1, strategy="repeat")
    q = torch.zeros(plan.num_queries, 1, 8, dtype=torch.bfloat16)
    k, v = q.clone(), q.clone().requires_grad_()
    out = packed_attention(q, k, v, plan)
    grad = torch.full_like(out, 1 + 2**-7)  # 1.0078125 in bf16
    grad[0] = 0
    (dv,) = torch.autograd.grad(out, v, grad)
    want = responses * 0.5 * (1 + 2**-7)
    torch.testing.assert_close(dv[0].float(), torch.full((1, 8), want), rtol=2**-8, atol=0)


def test_strided_and_expanded_inputs():
    plan = make_plan([0, 6, 10], [(0, 0), (0, 6)])
    q, k, v, _ = tensors(plan, torch.float32)
    wide = torch.stack((q, q), -1).flatten(2)[..., ::2].requires_grad_()
    assert not wide.is_contiguous()
    out = packed_attention(wide, k, v, plan)
    torch.testing.assert_close(out, packed_attention(q, k, v, plan))
    (grad,) = torch.autograd.grad(out.sum(), wide)
    assert torch.isfinite(grad).all()


def test_attention_pairs_count_the_mask():
    cu, prefix = [0, 5, 9, 9, 16, 20], [(0, 0), (0, 0), (0, 0), (0, 5), (5, 9)]
    for ranges in (None, [(3, 12)]):
        plan = make_plan(cu, prefix, ranges=ranges)
        assert plan.attention_pairs == int(visible(plan, torch.device("cpu")).sum())


def test_strategy_follows_the_break_even():
    short_prompt = make_plan([0, 10, 110, 210], [(0, 0), (0, 10), (0, 10)])
    long_prompt = make_plan([0, 100, 102, 104], [(0, 0), (0, 100), (0, 100)], heads=2, kv_heads=2)
    assert (short_prompt.strategy, long_prompt.strategy) == ("repeat", "merge")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_and_opcheck(backend):
    plan = make_plan([0, 3, 5, 7], [(0, 0), (0, 3), (0, 3)], heads=2, kv_heads=1, head_dim=2, strategy="merge")
    q, k, v, grad = tensors(plan, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, plan, backend=backend), inputs)
    torch.library.opcheck(torch.ops.tulu_hpc.packed_attention.default, (*inputs, plan.handle, 0.5, backend))
    with torch.no_grad():
        out, lse = torch.ops.tulu_hpc.packed_attention(*inputs, plan.handle, 0.5, backend)
    torch.library.opcheck(
        torch.ops.tulu_hpc.packed_attention_backward.default,
        (grad, *(x.detach() for x in inputs), out, lse, plan.handle, 0.5, backend),
    )


def test_compiles_without_graph_breaks():
    plan = make_plan([0, 3, 5, 7], [(0, 0), (0, 3), (0, 3)])
    q, k, v, _ = tensors(plan, torch.float32)
    q.requires_grad_()

    def loss(x):
        return packed_attention(x, k, v, plan).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q), torch.autograd.grad(loss(q), q))


def test_the_plan_lives_until_the_backward_pass():
    plan = make_plan([0, 3, 5])
    q, k, v, _ = tensors(plan, torch.float32)
    q.requires_grad_()
    out = packed_attention(q, k, v, plan).sum()
    handle = plan.handle
    del plan
    gc.collect()
    (grad,) = torch.autograd.grad(out, q)
    assert torch.isfinite(grad).all()
    del out, grad
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        torch.ops.tulu_hpc.packed_attention(q.detach(), k, v, handle, 1.0, "cpu")


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="ascend"):
        make_plan([0, 5, 3])
    with pytest.raises(ValueError, match="segment 1"):
        make_plan([0, 5, 8], [(0, 0), (0, 6)])
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        make_plan([0, 5], heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="permutation"):
        make_plan([0, 3], key_order=torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="leave the 5 rows"):
        make_plan([0, 5], ranges=[(2, 6)])
    with pytest.raises(ValueError, match="strategy"):
        make_plan([0, 5], strategy="glue")
    plan = make_plan([0, 5])
    q, k, v, _ = tensors(plan, torch.float32)
    with pytest.raises(ValueError, match=r"q is \[4, 4, 8\]"):
        packed_attention(q[:4], k, v, plan)
    with pytest.raises(ValueError, match=r"v is torch\.float64"):
        packed_attention(q, k, v.double(), plan)
    if available_backends("packed_attention")["flash"] != "usable":
        for backend in ("flash", "flash:fa3"):
            with pytest.raises(BackendError, match="no CUDA device"):
                packed_attention(q, k, v, plan, backend=backend)


def test_what_flash_takes():
    """The choice itself is tested beside the Triton backend."""
    assert ops._default_backend(torch.empty(2, 4, 64)) == "cpu"
    for dtype, head_dim, takes in (
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.float32, 64, False),
        (torch.bfloat16, 12, False),
        (torch.bfloat16, 264, False),
    ):
        assert (flash.refusal(dtype, head_dim) is None) is takes
