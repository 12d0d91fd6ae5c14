"""policy_loss: against its definition, peers and the fp64 reference; extremes, active tokens, context parallelism."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.fuzz import close
from tests.kernels.policy_cases import NAMES, SOME, cast, definition, options_of, pack, run, sequence_sums
from tulu_hpc.kernels import (
    BackendError,
    available_backends,
    last_backend,
    policy_loss,
)
from tulu_hpc.kernels.policy_loss.problem import KINDS, NORMALISATIONS
from tulu_hpc.kernels.policy_loss.reference import kl_estimate

BACKENDS = ["cpu", "triton"]


def assert_same(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    (out, grad, grad_entropy), (out64, grad64, grad_entropy64) = got, want
    near = {"rtol": tolerance, "atol": tolerance}
    close(out.loss.double(), out64.loss, **near)
    close(grad.double(), grad64, **near)
    close(grad_entropy.double(), grad_entropy64, **near)
    assert torch.equal(out.active_K, out64.active_K)
    assert out.metrics.keys() == out64.metrics.keys() and out.extremes.keys() == out64.extremes.keys()
    for found, wanted in ((out.metrics, out64.metrics), (out.extremes, out64.extremes)):
        for name in wanted:
            close(found[name].double(), wanted[name], **near, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", SOME, ids=NAMES)
def test_reference_is_the_definition(options: dict[str, Any]) -> None:
    columns = pack([3, 1, 4, 2], seed=1)
    out, grad, grad_entropy = run(columns, **options)
    assert last_backend("policy_loss") == "reference"
    leaves = {name: columns[name].clone().requires_grad_() for name in ("logprobs_K", "entropy_K")}
    loss = definition({**columns, **leaves}, **options)
    want = torch.autograd.grad(loss * 1.5, list(leaves.values()))
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(grad, want[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_entropy, want[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cispo"])  # its ratio has no gradient on purpose
def test_gradcheck(kind: str) -> None:
    options = options_of(kind, "sequence_mean", "truncated", "token", "k3")
    c = pack([3, 2, 1], seed=2)
    logprobs, entropy = c.pop("logprobs_K").requires_grad_(), c.pop("entropy_K").requires_grad_()
    behaviour, advantages, ids = (c.pop(name) for name in ("behaviour_logprobs_K", "advantages_K", "sequence_id_K"))

    def loss(x: Tensor, h: Tensor) -> Tensor:
        return policy_loss(x, behaviour, advantages, ids, entropy_K=h, **c, **options).loss

    assert torch.autograd.gradcheck(loss, (logprobs, entropy))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=7),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.01, 0.4, 2.0]),
    left_out=st.sets(st.sampled_from(["weights_K", "old_logprobs_K"])),
    kind=st.sampled_from(KINDS),
    normalisation=st.sampled_from(NORMALISATIONS),
    importance=st.sampled_from(["none", "truncated", "masked"]),
    level=st.sampled_from(["token", "sequence"]),
    kl_kind=st.sampled_from(["k1", "k2", "k3"]),
)
def test_backends_against_the_reference(
    backend, lengths, seed, spread, left_out, kind, normalisation, importance, level, kl_kind
):
    columns = {name: column for name, column in pack(lengths, seed, spread).items() if name not in left_out}
    if "old_logprobs_K" in left_out:
        importance = "none"
    options = options_of(kind, normalisation, importance, level, kl_kind) | {"num_sequences": len(lengths)}
    want = run(columns, **options, backend="reference")
    got = run(cast(columns, torch.float32), **options, backend=backend)
    assert last_backend("policy_loss") == backend
    assert_same(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, normalisation", [("grpo", "sum"), ("gspo", "sequence_mean")])
def test_more_tokens_than_a_block(backend: str, kind: str, normalisation: str) -> None:
    """Several programs, several blocks of a sequence, two levels of bisection, several chunks of the C++ core."""
    lengths = [1030, 1, 0, 2500, 700, 5] if backend == "triton" else [5000, 1, 0, 3500, 700]
    columns = pack(lengths)
    options = options_of(kind, normalisation, "truncated", "token", "k3")
    want = run(columns, **options, backend="reference")
    got = run(cast(columns, torch.float32), **options, backend=backend)
    out, out64 = got[0], want[0]
    # A ratio at a clip's edge may fall on the other side in fp32.
    assert int((out.active_K != out64.active_K).sum()) <= 2
    torch.testing.assert_close(out.loss.double(), out64.loss, rtol=1e-5, atol=1e-4)
    assert float((got[1].double() - want[1]).abs().median()) < 1e-6
    for name in ("policy/kl", "policy/behaviour_kl", "policy/ratio", "policy/importance", "policy/entropy"):
        torch.testing.assert_close(out.metrics[name].double(), out64.metrics[name], rtol=1e-5, atol=1e-5)


class CountLaunches:
    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.count += 1
        return self.kernel[grid]


def test_triton_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tulu_hpc.kernels.policy_loss import triton_kernels

    kernels = {name: CountLaunches(getattr(triton_kernels, name)) for name in ("token_kernel", "sequence_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_kernels, name, kernel)
    columns = cast(pack([3, 2]), torch.float32)
    run(columns, kind="grpo", backend="triton")
    assert [kernel.count for kernel in kernels.values()] == [1, 0]
    run(columns, kind="gspo", normalisation="sequence_mean", backend="triton")
    assert [kernel.count for kernel in kernels.values()] == [1, 1]


# ------------------------------------------------------------------------------------------- values and numerics
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_first_step_is_the_policy_gradient(backend: str) -> None:
    """Equal policies: ratio 1, KL 0, gradient -advantage; clipped tokens have none."""
    c = cast(pack([4, 4, 4], seed=1), torch.float32)
    logprobs, advantages, ids = c["logprobs_K"].requires_grad_(), c["advantages_K"], c["sequence_id_K"]
    same = logprobs.detach()
    out = policy_loss(logprobs, same, advantages, ids, reference_logprobs_K=same, kl_coef=1.0, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logprobs)[0], -advantages)
    assert float(out.metrics["policy/kl"]) == 0 and float(out.metrics["policy/ratio"]) == 12
    assert float(out.extremes["policy/ratio_min"]) == float(out.extremes["policy/ratio_max"]) == 1
    out = policy_loss(logprobs, same - 1, advantages.abs(), ids, backend=backend)
    assert not torch.autograd.grad(out.loss, logprobs)[0].any() and not out.active_K.any()
    assert float(out.metrics["policy/clip_fraction"]) == float(out.metrics["policy/clip_fraction_high"]) == 12


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_active_tokens(backend: str) -> None:
    """No advantage, clipped high, clipped low, dual clip, masked weight: not active; a KL or entropy term: active."""
    log_ratio = torch.tensor([0.1, 0.5, -0.5, 2.0, 0.0, 0.0, 0.5, -0.5])
    advantages = torch.tensor([0.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    engine = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0])
    old, ids = torch.full((8,), -1.0), torch.arange(8)
    options: dict[str, Any] = {"kind": "ppo", "old_logprobs_K": old, "importance": "masked", "backend": backend}

    def active(**more: Any) -> list[int]:
        logprobs = (old + log_ratio).requires_grad_()
        entropy = torch.ones(8, requires_grad=True)
        out = policy_loss(logprobs, old - engine, advantages, ids, entropy_K=entropy, **options, **more)
        grads = torch.autograd.grad(out.loss, (logprobs, entropy))
        assert torch.equal(out.active_K, (grads[0] != 0) | (grads[1] != 0))
        assert float(out.metrics["policy/active"]) == int(out.active_K.sum())
        return out.active_K.nonzero()[:, 0].tolist()

    assert active() == [5, 6, 7]
    assert active(entropy_coef=0.1) == list(range(8))
    assert active(reference_logprobs_K=old + log_ratio) == [5, 6, 7]
    # The KL's own gradient is zero where policy and reference agree.
    reference = torch.where(torch.arange(8) < 2, old + log_ratio, old + log_ratio - 0.1)
    assert active(reference_logprobs_K=reference, kl_coef=0.1) == list(range(2, 8))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_k3_keeps_its_digits_near_zero(backend: str) -> None:
    d = torch.tensor([1e-4, -3e-3, 2e-2, 0.3])
    exact = (torch.expm1(-d.double()) + d.double()).sum()
    zero, ids = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    out = policy_loss(d, d, zero, ids, reference_logprobs_K=zero, backend=backend)
    assert float(out.metrics["policy/kl_k3"]) == pytest.approx(float(exact), rel=1e-6)
    small = policy_loss(*(x[:1] for x in (d, d, zero, ids)), reference_logprobs_K=zero[:1], backend=backend)
    naive = float((-d[0]).exp() - 1 + d[0])
    assert float(small.metrics["policy/kl"]) == pytest.approx(0.5e-8, rel=1e-2)
    assert naive != pytest.approx(0.5e-8, rel=0.5)


def test_kl_estimates_are_bounded() -> None:
    assert torch.isfinite(kl_estimate(torch.tensor([-1e4]), torch.zeros(1), "k3")).all()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k9")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_log_ratios(backend: str, kind: str, level: str) -> None:
    """Nothing overflows, and a bounded log-ratio has no gradient: without KL such tokens are not active."""
    values = torch.tensor([0.0, 1e4, -1e4, 50.0, -50.0, 1e4])
    old, ids = torch.full((6,), -1.0), torch.tensor([0, 1, 2, 3, 4, 4])
    for advantage, kl_coef in itertools.product((1.0, -1.0, 0.0), (0.0, 0.1)):

        def call(dtype: torch.dtype, name: str, a: float = advantage, kl: float = kl_coef) -> Any:
            logprobs = (old + values).to(dtype).requires_grad_()
            column = torch.full((6,), a, dtype=dtype)
            out = policy_loss(
                logprobs, (old + values.flip(0)).to(dtype), column, ids, kind=kind, old_logprobs_K=old.to(dtype),
                reference_logprobs_K=old.to(dtype), kl_coef=kl, importance="truncated", importance_level=level,
                backend=name,
            )  # fmt: skip
            return out, torch.autograd.grad(out.loss, logprobs)[0]

        (out, grad), (out64, grad64) = call(torch.float32, backend), call(torch.float64, "reference")
        assert torch.isfinite(grad).all() and torch.isfinite(out.loss)
        assert all(torch.isfinite(x) for x in (*out.metrics.values(), *out.extremes.values()))
        torch.testing.assert_close(grad.double(), grad64, rtol=1e-4, atol=1e-5)
        assert torch.equal(out.active_K, out64.active_K)
        if kl_coef == 0 and kind not in ("cispo", "gspo"):
            assert not out.active_K[1:].any() or advantage > 0
            assert not out.active_K[[1, 2, 5]].any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_is_not_hidden(backend: str) -> None:
    c = cast(pack([4]), torch.float32)
    c["logprobs_K"][1] = math.nan
    out, grad, _ = run(c, backend=backend)
    assert out.loss.isnan() and grad[1].isnan() and grad[[0, 2, 3]].isfinite().all() and out.active_K[1]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_no_tokens(backend: str, normalisation: str) -> None:
    divisor = 3.0 if normalisation == "constant" else None
    for sequences in (0, 2):
        out, grad, _ = run(
            cast(pack([]), torch.float32), normalisation=normalisation, divisor=divisor, num_sequences=sequences,
            kl_coef=0.1, kind="gspo", backend=backend,
        )  # fmt: skip
        assert float(out.loss.detach()) == 0 and len(grad) == len(out.active_K) == 0
        assert all(float(value) == 0 for value in out.metrics.values())
        assert float(out.extremes["policy/ratio_min"]) == math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    columns = cast(pack([3, 2]), torch.float32)
    want = run(columns, kind="gspo", backend=backend)
    strided = {name: torch.stack([column, column], 1)[:, 0] for name, column in columns.items()}
    strided["advantages_K"] = torch.tensor(0.5).expand(5)
    columns["advantages_K"] = torch.full((5,), 0.5)
    want, got = run(columns, kind="gspo", backend=backend), run(strided, kind="gspo", backend=backend)
    assert torch.equal(got[0].loss, want[0].loss) and torch.equal(got[1], want[1])


def test_threads_change_nothing() -> None:
    columns = cast(pack([9000, 7000]), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(columns, kind="ppo", kl_coef=0.1, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0].loss, results[1][0].loss) and torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(results[0][0].metrics[name], value) for name, value in results[1][0].metrics.items())


# ------------------------------------------------------------------------------------------------ order and errors
def test_ids_out_of_order() -> None:
    columns = pack([4, 3, 2], seed=5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = {name: column[order] for name, column in columns.items()}
    want = run(columns, kind="gspo")
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        got = run(cast(shuffled, dtype), kind="gspo", backend=backend)
        torch.testing.assert_close(got[0].loss.double(), want[0].loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1].double(), want[1][order], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'triton' needs sequence_id_K in order"):
        run(cast(shuffled, torch.float32), kind="gspo", backend="triton")


@pytest.mark.parametrize("ids", [[1, 0, 1, 0], [0, 0, 1, 7], [-1, 0, 0, 1]])
def test_the_kernel_finds_wrong_ids_itself(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """As on CUDA, where no check on the host is made: the loss and all gradients are NaN."""
    from tulu_hpc.kernels.policy_loss import arguments, ops

    monkeypatch.setattr(arguments, "count_sequences", lambda *_: 2)
    monkeypatch.setattr(ops, "_check_order", lambda *_: None)
    columns = cast(pack([2, 2]), torch.float32) | {"sequence_id_K": torch.tensor(ids)}
    out, grad, _ = run(columns, kind="gspo", backend="triton")
    assert out.loss.isnan() and grad.isnan().all()


def test_errors() -> None:
    c = pack([4, 4, 4], seed=1)
    four = [c[name] for name in ("logprobs_K", "behaviour_logprobs_K", "advantages_K", "sequence_id_K")]

    def refused(message: str, error: type[Exception] = ValueError, args: list[Tensor] = four, **options: Any) -> None:
        with pytest.raises(error, match=message):
            policy_loss(*args, **options)

    refused("kind must be ppo, grpo, dr_grpo, dapo, gspo or cispo, got 'ppa'", kind="ppa")
    refused("kl_kind must be k1, k2 or k3", kl_kind="k9")
    refused("importance must be none", importance="some")
    refused("importance_level must be token or sequence", importance_level="pack")
    refused("normalisation must be sum", normalisation="mean")
    refused("clip_low", clip_low=-0.1)
    refused("dual_clip must be greater than 1", kind="ppo", dual_clip=0.5)
    refused("not for cispo", kind="cispo", dual_clip=2.0)
    refused("importance_low <= importance_high", importance_low=3.0)
    refused("needs a positive divisor", normalisation="constant")
    refused("and no other", divisor=2.0)
    refused("kl_coef needs reference_logprobs_K", kl_coef=0.1)
    refused("entropy_coef needs entropy_K", entropy_coef=0.1)
    refused("need old_logprobs_K", importance="masked")
    refused("advantages_K must be \\[12\\]", args=[four[0], four[1], four[2][:3], four[3]])
    refused("sequence_id_K must be torch.int64", TypeError, [*four[:3], four[3].int()])
    refused("advantages_K must be torch.float64, got torch.float32", TypeError, [*four[:2], four[2].float(), four[3]])
    refused("float32 or float64", TypeError, [x.bfloat16() for x in four[:3]] + four[3:])
    refused("behaviour_logprobs_K is on meta", args=[four[0], four[1].to("meta"), *four[2:]])
    refused("holds 0..2, there are 2 sequences", kind="gspo", num_sequences=2)
    refused("sequence_sums_Q5 must be \\[Q, 5\\]", kind="gspo", sequence_sums_Q5=torch.zeros(3, 4).double())
    refused("has 3 rows", kind="gspo", num_sequences=4, sequence_sums_Q5=torch.zeros(3, 5).double())
    refused("no backend 'cuda'", BackendError, backend="cuda")
    for backend in BACKENDS:
        refused("has no float64", BackendError, backend=backend)
    assert list(available_backends("policy_loss")) == ["reference", "cpu", "triton"]


# ------------------------------------------------------------------------------------------------- torch.library
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend: str) -> None:
    c = cast(pack([3, 2]), torch.float32)
    optional = [c["old_logprobs_K"], c["reference_logprobs_K"], None, c["entropy_K"].requires_grad_(), None]
    words = ("gspo", "k3", "masked", "token", "sequence_mean")
    numbers = [0.2, 0.2, float("inf"), 0.1, 0.5, 2.0, 0.1, 1.0]
    inputs = [c["logprobs_K"].requires_grad_(), c["behaviour_logprobs_K"], c["advantages_K"], c["sequence_id_K"]]
    torch.library.opcheck(torch.ops.tulu_hpc.policy_loss, (*inputs, *optional, *words, numbers, 2, backend))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_compile(backend: str, kind: str) -> None:
    c = cast(pack([3, 2]), torch.float32)
    c.pop("entropy_K")

    def loss(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest = {name: column for name, column in c.items() if name not in ("logprobs_K", "weights_K")}
        out = policy_loss(2 * x, **rest, kind=kind, kl_coef=0.1, num_sequences=2, backend=backend)
        return out.loss, out.metrics["policy/kl"], out.active_K

    x, y = c["logprobs_K"].clone().requires_grad_(), c["logprobs_K"].clone().requires_grad_()
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(y)
    assert last_backend("policy_loss") == backend
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad(out[0], leaf)[0] for out, leaf in ((got, x), (want, y))))
    assert not got[1].requires_grad


def test_compile_needs_the_number_of_sequences() -> None:
    c = cast(pack([3, 2]), torch.float32)
    four = [c[name] for name in ("logprobs_K", "behaviour_logprobs_K", "advantages_K", "sequence_id_K")]
    with pytest.raises(Exception, match="needs num_sequences"):
        torch.compile(lambda *x: policy_loss(*x, kind="gspo").loss, fullgraph=True, backend="aot_eager")(*four)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("with_sums", [False, True])
def test_clips_of_gspo(backend: str, with_sums: bool) -> None:
    """Mean log-ratios 0.5, 0.5, -0.5, 0.1 with advantages -1, 1, -1, -1: dual clip, high, low, none."""
    lengths = torch.tensor([2, 3, 1, 2])
    ids = torch.arange(4).repeat_interleave(lengths)
    old = torch.full((8,), -1.0)
    columns = {
        "logprobs_K": old + torch.tensor([0.5, 0.5, -0.5, 0.1])[ids] + torch.tensor([0.1, -0.1, 0, 0, 0, 0, 0.2, -0.2]),
        "behaviour_logprobs_K": old,
        "advantages_K": torch.tensor([-1.0, 1.0, -1.0, -1.0])[ids],
        "sequence_id_K": ids,
    }
    sums = sequence_sums(columns, {}, 4) if with_sums else None
    options = {"kind": "gspo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.3, "num_sequences": 4}
    out, grad, _ = run(columns, **options, sequence_sums_Q5=sums, backend=backend)
    ratio = torch.tensor(0.1).exp()
    torch.testing.assert_close(out.loss, 2 * 1.3 - 3 * 1.2 + 0.8 + 2 * ratio)
    torch.testing.assert_close(grad / 1.5, torch.cat([torch.zeros(6), ratio.expand(2)]))
    assert out.active_K.tolist() == [False] * 6 + [True] * 2
    counts = {"dual_clip_fraction": 2, "clip_fraction_high": 3, "clip_fraction_low": 1, "clip_fraction": 4}
    assert {name: int(out.metrics[f"policy/{name}"]) for name in counts} == counts
