"""preference_loss: formulas by hand, and every backend against the fp64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.fuzz import close
from tulu_hpc.kernels import available_backends, last_backend, preference_loss
from tulu_hpc.kernels.preference_loss.problem import KINDS

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
BACKENDS = ["cpu", "triton"]
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"label_smoothing": 0.1},
    "dpo_norm": {"label_smoothing": 0.0, "sft_weight": 0.3},
    "cdpo": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "simpo": {"gamma": 0.5, "label_smoothing": 0.1},
    "ipo": {},
    "hinge": {"sft_weight": 1.0},
    "orpo": {},
    "kto": {"kl": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7},
}


def make_case(lengths: list[int], pairs: list[list[int]], seed: int = 0, scale: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    return {
        "logprobs_K": (-scale * torch.rand(int(sizes.sum()), generator=generator)).float(),
        "sequence_id_K": torch.repeat_interleave(torch.arange(len(lengths)), sizes),
        "reference_sums_Q": (-scale / 2 * sizes + torch.randn(len(lengths), generator=generator)).float(),
        "pairs_P2": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
    }


def evaluate(
    case: dict[str, Tensor], backend: str, wrt: str = "logprobs_K", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient of twice the loss, metrics; on the CPU, in fp64. Asserts which backend ran."""
    device = DEVICE.get(backend, "cpu")
    inputs = {
        name: x.to(device, dtype if x.is_floating_point() and name in ("logprobs_K", "policy_sums_Q") else x.dtype)
        for name, x in case.items()
    }
    inputs[wrt] = inputs[wrt].detach().requires_grad_()
    out = preference_loss(**inputs, **{"beta": 0.3, **options}, backend=backend)
    assert last_backend("preference_loss") == backend
    (gradient,) = torch.autograd.grad(2 * out.loss, inputs[wrt])
    assert gradient.dtype == dtype == out.loss.dtype
    return (
        out.loss.detach().cpu().double(),
        gradient.cpu().double(),
        {k: v.cpu().double() for k, v in out.metrics.items()},
    )


def check(case: dict[str, Tensor], backend: str, wrt: str = "logprobs_K", **options: Any) -> None:
    """Loss, gradient and metrics of a backend against the fp64 reference, to fp32 rounding."""
    loss, gradient, metrics = evaluate(case, backend, wrt, **options)
    wanted_loss, wanted_gradient, wanted_metrics = evaluate(case, "reference", wrt, torch.float64, **options)
    close(loss, wanted_loss, rtol=1e-6, atol=1e-6)
    close(gradient, wanted_gradient, rtol=1e-6, atol=1e-9)
    assert metrics.keys() == wanted_metrics.keys()
    for name in metrics:
        close(metrics[name], wanted_metrics[name], rtol=1e-6, atol=1e-6)


def by_hand(case: dict[str, Tensor], kind: str, beta: float, o: dict[str, Any]) -> float:
    """Sum of losses from the papers' formulas, in Python floats."""

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    def mean(q: int) -> float:
        tokens = case["logprobs_K"][case["sequence_id_K"] == q].double()
        return float(tokens.mean()) if len(tokens) else 0.0

    def ratio(q: int) -> float:
        n = max(int((case["sequence_id_K"] == q).sum()), 1)
        return mean(q) - float(case["reference_sums_Q"][q].double()) / n if q >= 0 else 0.0

    def total(q: int) -> float:
        return ratio(q) * int((case["sequence_id_K"] == q).sum())

    def odds(q: int) -> float:
        return math.exp(mean(q)) / (1 - math.exp(mean(q)))

    s = o.get("label_smoothing", 0.0)
    result = 0.0
    for c, r in case["pairs_P2"].tolist():
        if kind in ("dpo", "cdpo", "robust"):
            z = beta * (total(c) - total(r))
            good, bad = -math.log(sigmoid(z)), -math.log(sigmoid(-z))
            result += ((1 - s) * good - s * bad) / (1 - 2 * s) if kind == "robust" else (1 - s) * good + s * bad
        elif kind == "dpo_norm":
            result += -math.log(sigmoid(beta * (ratio(c) - ratio(r))))
        elif kind == "simpo":
            z = beta * mean(c) - beta * mean(r) - o["gamma"]
            result += -(1 - s) * math.log(sigmoid(z)) - s * math.log(sigmoid(-z))
        elif kind == "ipo":
            result += (ratio(c) - ratio(r) - 1 / (2 * beta)) ** 2
        elif kind == "hinge":
            result += max(0.0, 1 - beta * (total(c) - total(r)))
        elif kind == "orpo":
            result += -beta * math.log(sigmoid(math.log(odds(c) / odds(r)))) - mean(c)
        else:
            if c >= 0:
                result += o["desirable_weight"] * (1 - sigmoid(beta * (total(c) - o["kl"])))
            if r >= 0:
                result += o["undesirable_weight"] * (1 - sigmoid(beta * (o["kl"] - total(r))))
        if kind != "orpo":
            result += o.get("sft_weight", 0.0) * -mean(c)
    return result


def unpaired(kind: str, pairs: list[list[int]]) -> list[list[int]]:
    """For kto: the second pair loses its rejected side, the third its chosen one."""
    if kind == "kto":
        pairs = [[c, -1] if i == 1 else [-1, r] if i == 2 else [c, r] for i, (c, r) in enumerate(pairs)]
    return pairs


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind: str, backend: str) -> None:
    case = make_case([3, 1, 4, 2, 6, 5], unpaired(kind, [[0, 1], [3, 2], [4, 5]]))
    loss, _, metrics = evaluate(case, backend, kind=kind, **OPTIONS[kind])
    assert float(loss) == pytest.approx(by_hand(case, kind, 0.3, OPTIONS[kind]), rel=1e-6)
    pairs = case["pairs_P2"].tolist()
    assert float(metrics["counts/chosen"]) == sum(c >= 0 for c, _ in pairs)
    assert float(metrics["lengths/chosen"]) == sum([3, 1, 4, 2, 6, 5][c] for c, _ in pairs if c >= 0)
    sums = [float(case["logprobs_K"][case["sequence_id_K"] == q].double().sum()) for q in range(6)]
    assert float(metrics["logps/rejected"]) == pytest.approx(sum(sums[r] for _, r in pairs if r >= 0), rel=1e-6)
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    torch.testing.assert_close(metrics["rewards/margins"], margin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind: str) -> None:
    case = make_case([3, 1, 4, 2, 0, 5], unpaired(kind, [[0, 1], [3, 2], [5, 1]]))
    rest = {name: x.double() if x.is_floating_point() else x for name, x in case.items() if name != "logprobs_K"}
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    x = case["logprobs_K"].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: preference_loss(x, **rest, kind=kind, beta=0.3, weights_P=weights, **OPTIONS[kind]).loss, x
    )
    assert last_backend("preference_loss") == "reference"


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    lengths = draw(st.lists(st.integers(0, 9), min_size=2, max_size=7))
    if draw(st.booleans()):
        lengths[draw(st.integers(0, len(lengths) - 1))] = draw(st.sampled_from([257, 1024, 1500]))
    kind = draw(st.sampled_from(list(KINDS)))
    ids = st.integers(0, len(lengths) - 1)
    pair = st.tuples(ids, ids)
    if kind == "kto":
        pair = pair | st.tuples(ids, st.just(-1)) | st.tuples(st.just(-1), ids)
    pairs = draw(st.lists(pair, max_size=5))  # sequences may be in several pairs, or in none, or in both sides of one
    case = make_case(lengths, [list(p) for p in pairs], draw(st.integers(0, 99)))
    options = {"kind": kind, "beta": draw(st.sampled_from([0.1, 1.0, 5.0])), **OPTIONS[kind]}
    if draw(st.booleans()):
        case["weights_P"] = torch.rand(len(pairs))
    if kind != "kto" and draw(st.booleans()):
        options["weighting"] = "wpo"
        if draw(st.booleans()):
            case["alignment_sums_Q"] = -torch.rand(len(lengths)) * torch.tensor(lengths)
    if draw(st.booleans()):
        case["reference_sums_Q"] = case["reference_sums_Q"].double()
    if kind == "kto" and draw(st.booleans()):
        case["kl"] = torch.tensor(draw(st.sampled_from([-1.0, 0.4])))
        del options["kl"]
    wrt = draw(st.sampled_from(["logprobs_K", "policy_sums_Q"]))
    if wrt == "policy_sums_Q":
        zeros = torch.zeros(len(lengths))
        case["policy_sums_Q"] = zeros.index_add(0, case["sequence_id_K"], case["logprobs_K"])
        case["lengths_Q"] = torch.tensor(lengths)
        case["logprobs_K"], case["sequence_id_K"] = case["logprobs_K"][:0], case["sequence_id_K"][:0]
    return case, wrt, options


def random_cases(backend: str, examples: int) -> int:
    ran = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(cases())
    def run(drawn: tuple[dict[str, Tensor], str, dict[str, Any]]) -> None:
        nonlocal ran
        case, wrt, options = drawn
        check(case, backend, wrt, **options)
        ran += 1

    run()
    return ran


@pytest.mark.parametrize(("backend", "examples"), [("cpu", 150), ("triton", 25)])
def test_random_cases(backend: str, examples: int) -> None:
    assert random_cases(backend, examples) >= examples


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind: str, backend: str) -> None:
    """Margins of 1e4, certain tokens (log-prob 0), sequences without tokens, equal sequences: finite and right."""
    case = make_case([2, 2, 0, 3, 1, 0], [[0, 1], [1, 0], [2, 3], [3, 2], [4, 5], [2, 5], [3, 3]])
    case["logprobs_K"] = torch.tensor([-1e4, -1e4, 0.0, 0.0, -1.0, -2.0, -90.0, -1e-7])
    case["reference_sums_Q"] = torch.zeros(6)
    check(case, backend, kind=kind, **OPTIONS[kind])
    loss, gradient, metrics = evaluate(case, backend, kind=kind, **OPTIONS[kind])
    assert torch.isfinite(torch.stack([loss, *metrics.values()])).all() and torch.isfinite(gradient).all()
    if kind == "dpo":
        assert float(loss) > 0.9 * 0.3 * 2e4 and gradient[:2].lt(0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_do(backend: str) -> None:
    no_pairs = make_case([2, 3], [])
    loss, gradient, metrics = evaluate(no_pairs, backend)
    assert float(loss) == 0 and not gradient.any() and not any(float(x) for x in metrics.values())
    nothing = make_case([], [])
    loss, gradient, _ = evaluate(nothing, backend)
    assert float(loss) == 0 and gradient.shape == (0,)
    only_empty = make_case([0, 0], [[0, 1]])
    loss, gradient, _ = evaluate({**only_empty, "reference_sums_Q": torch.zeros(2)}, backend)
    assert float(loss) == pytest.approx(math.log(2)) and gradient.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend: str) -> None:
    case = make_case([3, 2, 4, 1], [[0, 1], [2, 3]])
    wanted = evaluate(case, backend, kind="dpo_norm")
    strided = dict(case)
    strided["logprobs_K"] = torch.stack([case["logprobs_K"]] * 2, 1)[:, 0]
    strided["pairs_P2"] = case["pairs_P2"].t().contiguous().t()
    strided["reference_sums_Q"] = torch.stack([case["reference_sums_Q"]] * 3, 1)[:, 1]
    strided["weights_P"] = torch.ones(1).expand(2)
    found = evaluate(strided, backend, kind="dpo_norm")
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_margin_is_exact(backend: str) -> None:
    """Equal models: margin 0, although the sums are long; unequal by 1e-3: right digits, as sums are fp64."""
    count = 3000
    case = make_case([count, count], [[0, 1]], scale=18.0)
    sums = torch.zeros(2, dtype=torch.float64).index_add(0, case["sequence_id_K"], case["logprobs_K"].double())
    for reference in (sums, sums.float()):
        loss, _, metrics = evaluate({**case, "reference_sums_Q": reference}, backend, beta=1.0)
        assert float(metrics["rewards/margins"]) == pytest.approx(0, abs=1e-9)
        assert float(loss) == pytest.approx(math.log(2), abs=1e-7)
    shifted = sums - torch.tensor([1e-3, 0.0], dtype=torch.float64)
    _, _, metrics = evaluate({**case, "reference_sums_Q": shifted}, backend, beta=1.0)
    assert float(metrics["rewards/margins"]) == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend: str) -> None:
    case = make_case([40, 3, 1200, 7], [[0, 1], [2, 3], [2, 0]])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(evaluate(case, backend, kind="dpo_norm", weighting="wpo"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_one_launch_leaves_its_counter_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next launch on the stream counts with the same one; and there is one launch, of one program per sequence."""
    from tulu_hpc.kernels.preference_loss import triton_kernels, triton_launch

    counter, grids, kernel = (
        torch.zeros(1, dtype=torch.int32, device=DEVICE["triton"]),
        [],
        triton_kernels.preference_kernel,
    )

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_launch, "_arrival_counter", lambda device: counter)
    monkeypatch.setattr(triton_kernels, "preference_kernel", Counted())
    case = make_case([3, 2, 4, 1], [[0, 1], [2, 3]])
    first = evaluate(case, "triton", kind="dpo_norm", sft_weight=0.1)
    assert grids == [(4,)] and int(counter) == 0
    second = evaluate(case, "triton", kind="dpo_norm", sft_weight=0.1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    case = {name: x.to(DEVICE[backend]) for name, x in make_case([3, 2, 0, 1], [[0, 1], [2, 3]]).items()}
    sums, lengths = torch.zeros_like(case["reference_sums_Q"]), torch.tensor([3, 2, 0, 1], device=DEVICE[backend])
    for policy_sums, table in ((None, None), (sums.requires_grad_(), lengths)):
        x = case["logprobs_K"].detach().requires_grad_(policy_sums is None)
        tensors = (x, case["sequence_id_K"], case["pairs_P2"], case["reference_sums_Q"], policy_sums, table)
        more = ("dpo_norm", [0.3, 0.1, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0], backend)
        torch.library.opcheck(torch.ops.tulu_hpc.preference_loss.default, (*tensors, None, None, None, *more))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compile(backend: str) -> None:
    """Two uses in one graph, without a graph break."""
    device = DEVICE.get(backend, "cpu")
    case = {name: x.to(device) for name, x in make_case([3, 2, 4, 1], [[0, 1], [2, 3]]).items()}
    ids, reference, pairs = case["sequence_id_K"], case["reference_sums_Q"], case["pairs_P2"]

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        first = preference_loss(x, ids, reference, pairs, kind="dpo_norm", beta=2.0, backend=backend)
        second = preference_loss(2 * x, ids, reference, pairs, kind="ipo", beta=0.5, sft_weight=0.1, backend=backend)
        return first.loss + second.loss, second.metrics["rewards/margins"]

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        x = case["logprobs_K"].clone().requires_grad_()
        loss, margins = function(x)
        assert not margins.requires_grad
        results.append((loss.detach(), *torch.autograd.grad(loss, x), margins))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


def test_defaults() -> None:
    case = make_case([3, 2], [[0, 1]])
    preference_loss(**case, beta=0.1)
    assert last_backend("preference_loss") == "cpu"
    preference_loss(**{**case, "logprobs_K": case["logprobs_K"].double()}, beta=0.1)
    assert last_backend("preference_loss") == "reference"
    assert available_backends("preference_loss").keys() == {"reference", "cpu", "triton"}
    out = preference_loss(**{**case, "reference_sums_Q": None}, kind="simpo", beta=2.0, lengths_Q=torch.tensor([3, 2]))
    wanted = preference_loss(**case, kind="simpo", beta=2.0)
    assert torch.equal(out.loss, wanted.loss)
    sums = preference_loss(**case, beta=0.1, policy_sums_Q=torch.zeros(2))
    assert "lengths/chosen" not in sums.metrics and "loss/sft" not in sums.metrics and "weights" not in sums.metrics
