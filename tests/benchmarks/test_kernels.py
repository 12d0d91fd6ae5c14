"""The kernels' benchmarks: the GPU's whole table on the CPU at small shapes, the measuring itself, and the verdicts."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention.varlen import varlen_attn

from tulu_hpc.kernels import bench_report, timing, triton_support
from tulu_hpc.kernels.bench_report import Goal, report, worst
from tulu_hpc.kernels.contest import contest, lines
from tulu_hpc.kernels.linear_logprob import bench as linear
from tulu_hpc.kernels.linear_logprob import buffers
from tulu_hpc.kernels.linear_logprob.ops import linear_logprob
from tulu_hpc.kernels.packed_attention import contestants, shapes
from tulu_hpc.kernels.packed_attention.reference import attention_dense
from tulu_hpc.kernels.timing import REHEARSAL, Run

FAMILIES = ["gae", "linear_logprob", "packed_attention", "policy_loss", "preference_loss", "rope"]
LARGEST_ERROR = {"gae": 1e-5, "packed_attention": 3e-2, "policy_loss": 1e-5, "preference_loss": 1e-5, "rope": 1e-2}
# Half a minute of compiling; a test of its own has them on one shape.
COMPILED = ["--skip", "compiled", "--skip", "cut-cross", "--skip", "flex"]

needs_interpreter = pytest.mark.skipif(
    not triton_support.interpreting(), reason="needs TRITON_INTERPRET=1; on a GPU the benchmark itself is run"
)


def run_bench(family: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    importlib.import_module(f"tulu_hpc.kernels.{family}.bench").main(list(arguments))
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def largest_error(family: str, line: dict[str, Any]) -> float:
    if family == "linear_logprob":  # log-probs are fp32; gradients are rounded to bf16
        return 1e-5 if line["pass"] == "forward" else 1e-2
    return LARGEST_ERROR[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_the_gpu_on_the_cpu(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every shape and contestant: ours have figures, other libraries figures or the reason why not."""
    paths = ("--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "tables.md"))
    result = run_bench(family, capsys, "--rehearse", "--skip", "triton", "--skip", "liger", *COMPILED, *paths)
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert result["mode"] == "rehearsal" and "the times mean nothing" in (tmp_path / "tables.md").read_text()
    module = shapes if family == "packed_attention" else importlib.import_module(f"tulu_hpc.kernels.{family}.bench")
    table = getattr(module, "CUDA", None) or module.FULL
    assert {line["shape"] for line in result["lines"]} == {shape.label for shape in table}
    measured = 0
    for line in result["lines"]:
        assert (line["ms"] is None) == bool(line["note"])
        if line["ms"] is None:
            assert line["note"].startswith("not measured: ")
            continue
        assert line["ms"] > 0 and line["roofline"] > 0
        if line["kernel"].startswith("ours"):
            measured += 1
            assert line["backend"] and line["extra_MiB"] >= 0
            assert line["error"] is None or line["error"] < largest_error(family, line)
    assert measured >= 2 * len(table) - 1
    assert all(goal["verdict"] == "not measured" for goal in result["goals"])


def test_what_needs_a_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench("packed_attention", capsys, "--rehearse", "--only", "causal", "--skip", "triton", *COMPILED)
    notes = {line["kernel"]: line["note"] for line in result["lines"]}
    for kernel in ("varlen_attn", "cudnn", "flash_attn"):
        assert notes[kernel] == "not measured: CUDA only"
    assert (
        "CUDA" in notes["ours flash:aten"]
        and "fa3" in str([*notes])
        and notes["flex"] == "not measured: left out by --skip"
        and not notes["sdpa"]
    )
    figures = [goal["figure"] for goal in result["goals"]]
    assert "H200: Triton, causal 8k D 128, backward, over the best library" in figures


@needs_interpreter
@pytest.mark.parametrize(
    ("family", "only"),
    [
        ("gae", "64k, S 8"),
        ("linear_logprob", "405B tp 8"),
        ("packed_attention", "8B tp 8 GRPO G 8"),
        ("policy_loss", "64k, Q 8"),
        ("preference_loss", "1M"),
        ("rope", "8B tp 8"),
    ],
)
def test_triton_takes_part(family: str, only: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench(family, capsys, "--rehearse", "--only", only, *COMPILED)
    mine = [line for line in result["lines"] if line["kernel"] == "ours triton"]
    assert mine
    for line in mine:
        assert line["backend"] == "triton" and line["ms"] > 0
        assert line["error"] is None or line["error"] < largest_error(family, line)


def test_compiled_peers_take_part(capsys: pytest.CaptureFixture[str]) -> None:
    """FlexAttention has no backward pass on the CPU, and says so."""
    only = ("--rehearse", "--only", "causal 8k, D 64", "--part", "attention", "--skip", "triton")
    result = run_bench("packed_attention", capsys, *only)
    forward, both = (line for line in result["lines"] if line["kernel"] == "flex")
    assert forward["ms"] > 0 and forward["error"] < 3e-2
    assert both["note"].startswith("not measured: NotImplementedError: FlexAttention does not support backward on CPU")
    result = run_bench("preference_loss", capsys, "--rehearse", "--only", "1M", "--skip", "triton")
    forward, both = (line for line in result["lines"] if line["kernel"] == "torch compiled")
    assert forward["ms"] > 0 and both["error"] < 1e-5


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    parser = timing.parser("what it does")
    for wrong in (["--quick", "--rehearse"], ["--js", "figures.json"]):  # a shortened name would pass other checks
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    with pytest.raises(SystemExit, match="--rehearse runs on the CPU"):
        timing.start(parser.parse_args(["--rehearse", "--device", "cuda"]))
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees no CUDA device"):
            timing.start(parser.parse_args(["--device", "cuda"]))
    with pytest.raises(SystemExit, match="no shape has '70C' in its label: 8B tp 1, "):
        run_bench("linear_logprob", capsys, "--rehearse", "--only", "70C")
    for mode, size in (("--quick", 256), ("--device=cpu", 512)):
        run = timing.start(parser.parse_args([mode]))
        assert run.gemm > 0 and run.copy > 0 and run.dtype == torch.float32
        assert run.table(linear.TABLES)[0].rows == size


# ------------------------------------------------------------------------------------------------ the measuring
RUN = Run("cpu", torch.float32, REHEARSAL, gemm=1.0, copy=1.0)


def raises(message: str) -> Any:
    raise NotImplementedError(message)


def test_figures_of_a_contest() -> None:
    x = torch.ones(2**18)
    found = contest(
        RUN,
        "gae",
        {"eager": lambda: x + (x * 2), "peer": lambda: raises("not here\nsecond line"), "absent": "no such library"},
        floors={"copy": x.clone},
        baseline="eager",
        error=lambda result: float((result - 3.5).abs().max()),
    )
    assert found["eager"].extra_MiB == pytest.approx(1.0, abs=0.01)  # x * 2; the result does not count
    assert found["eager"].error == 0.5 and found["eager"].ratio == 1.0
    assert found["copy"].ms is not None and found["copy"].error is None
    assert found["peer"].ms is None and found["peer"].note == "NotImplementedError: not here"
    assert found["absent"].note == "no such library"
    table = lines(found, shape={"pass": "forward"}, unit="GB/s", work=2e-3, floors=("copy",))
    assert [line["roofline"] for line in table if line["kernel"] == "copy"] == [1.0]
    eager = table[[line["kernel"] for line in table].index("eager")]
    assert eager["GB/s"] == pytest.approx(2e-3 / (1e-3 * eager["ms"]))
    assert eager["roofline"] == pytest.approx(found["copy"].ms / eager["ms"])


def test_our_own_failure_is_written_and_then_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = contest(
        RUN, "gae", {"ours cpu": lambda: raises("broken")}, floors={"copy": lambda: None}, baseline=None, error=None
    )
    table = lines(found, shape={"pass": "forward"}, unit="GB/s", work=1.0, floors=("copy",))
    run = Run("cpu", torch.float32, "quick", json=tmp_path / "figures.json", gemm=1.0, copy=1.0)
    with pytest.raises(SystemExit, match="gae: 1 lines of our own kernels failed, first: failed: NotImplementedError"):
        report("gae", run, table, [])
    assert json.loads(run.json.read_text())["lines"][1]["note"] == "failed: NotImplementedError: broken"  # type: ignore[union-attr]
    assert "ours cpu, forward: failed: NotImplementedError: broken (1 lines)" in capsys.readouterr().out


def test_versions_of_a_module_without_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """flash-attn-4 installs a module flash_attn without a distribution flash-attn: the figures are written all the
    same."""
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    versions = {"flash-attn-4": "4.0.0b36", "triton": "3.6.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise bench_report.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(bench_report.metadata, "version", version)
    run = Run("cpu", torch.float32, "quick", json=tmp_path / "figures.json", gemm=1.0, copy=1.0)
    report("gae", run, [], [])
    capsys.readouterr()
    assert json.loads((tmp_path / "figures.json").read_text())["versions"] == versions


def test_the_oracle_of_some_rows_is_the_definition() -> None:
    """On a pack with shared prefixes, against the dense mask of the whole pack."""
    run = Run("cpu", torch.float64, REHEARSAL)
    shape = shapes.Shape("", 2, 3, 5, 4, 4, 2, 16)
    pack = shapes.packs(shape, run)["shared"]
    q, k, v, grad = pack.tensors()
    q.requires_grad_()
    out = attention_dense(q, k, v, pack.plan(), pack.head_dim**-0.5)
    (gradient,) = torch.autograd.grad(out, q, grad)
    rows = torch.tensor([0, 4, 5, 9, 10, 13, 20, pack.rows - 1])
    for mine, right in zip(contestants.exact(pack, q, k, v, grad, rows), (out, gradient)):
        torch.testing.assert_close(mine, right[rows].detach(), rtol=1e-10, atol=1e-10)


def test_varlen_attention_of_several_versions_of_torch() -> None:
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
        ...

    def without(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):  # type: ignore[no-untyped-def]
        ...

    assert contestants.varlen_options(older, grouped=True) == {"is_causal": True}
    assert contestants.varlen_options(varlen_attn, grouped=True) == {"window_size": (-1, 0), "enable_gqa": True}
    assert contestants.varlen_options(varlen_attn, grouped=False) == {"window_size": (-1, 0)}
    with pytest.raises(contestants.Unavailable, match="neither window_size nor is_causal"):
        contestants.varlen_options(without, grouped=False)


def test_launches_are_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the profiler's events: not those of the host, and not the regions that torch.compile marks on the device."""
    gpu, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    once = [(gpu, False, 5), (gpu, True, 900), (host, False, 70), (gpu, False, 2)]
    found = [
        FunctionEvent(i, f"{i}", 0, 0, us, device_type=device, is_user_annotation=annotation)
        for i, (device, annotation, us) in enumerate(10 * once)
    ]
    calls = []
    profiler = SimpleNamespace(events=lambda: found)
    monkeypatch.setattr(timing, "profile", lambda activities: nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.kernel_microseconds(lambda: calls.append(1)) == (7.0, 2) and len(calls) == 11


# ------------------------------------------------------------------------------------------------ verdicts
@pytest.mark.parametrize(
    ("goal", "device", "verdict"),
    [
        (Goal("H200", "x", "≥", 0.85, 0.9), "NVIDIA H200", "met"),
        (Goal("H200", "x", "≥", 0.85, 0.8), "NVIDIA H200", "missed"),
        (Goal("H200", "x", "≤", 0.6, 0.7), "NVIDIA H100 80GB HBM3", "missed on NVIDIA H100 80GB HBM3"),
        (Goal("H200", "x", "≤", 0.6, 0.5), "cpu", "not measured"),
        (Goal("H200", "x", "=", 1, 1), "NVIDIA H200", "met"),
        (Goal("H200", "x", "=", 1, None), "NVIDIA H200", "not measured"),
        (Goal("cpu", "x", "≥", 1.4, 1.5), "cpu", "met"),
        (Goal("cpu", "x", "≥", 1.4, 1.5), "NVIDIA H200", "not measured"),
    ],
)
def test_verdict(goal: Goal, device: str, verdict: str) -> None:
    assert goal.row(device, True)["verdict"] == verdict
    assert goal.row(device, False) == {**goal.row(device, False), "value": None, "verdict": "not measured"}


def test_worst() -> None:
    assert worst([0.9, 0.8]) == 0.8 and worst([0.9, 0.8], max) == 0.9
    assert worst([]) is None and worst([0.9, None]) is None


def test_goals_of_linear_logprob_are_computed_from_its_lines() -> None:
    """The worst valid fraction counts; a peer that is faster on one shape is seen."""
    table = [
        {
            "shape": "8B tp 1",
            "valid": valid,
            "pass": "both",
            "kernel": kernel,
            "ms": ms,
            "roofline": roofline,
            "extra_MiB": 4096.0,
            "ratio": 2.0,
            "memory": 0.1,
        }
        for valid, peer in ((1.0, 5.0), (0.5, 1.5), (0.3, None))
        for kernel, ms, roofline in (("ours speed", 2.0, 0.8 + valid / 10), ("liger", peer, 0.1), ("GEMM", 1.0, 1.0))
    ]
    goals = {goal.figure: goal.value for goal in linear.goals(table)}
    assert goals["8B tp 1, speed, share of the 6NHV roofline"] == pytest.approx(0.83)
    assert goals["8B tp 1, speed, extra GiB"] == 4.0
    assert goals["8B tp 1, speed, times as fast as the best peer"] is None  # none was measured at 0.3
    assert goals["8B tp 1, memory, share of the 8NHV roofline"] is None
    measured = [line for line in table if line["valid"] != 0.3]
    goals = {goal.figure: goal.value for goal in linear.goals(measured)}
    assert goals["8B tp 1, speed, times as fast as the best peer"] == 0.75


@pytest.mark.parametrize("shape", linear.CUDA, ids=lambda shape: f"{shape.label} {shape.valid:g}")
def test_buffers_of_the_heads_stay_within_the_goals(shape: linear.Shape) -> None:
    """By calculation: speed keeps the logits; extra memory, copies of the valid rows included, is within the goal."""
    run = Run("cuda", torch.bfloat16, "full")
    used, tp = shape.rows - linear.ignored(shape), 128256 // shape.vocab
    limits = {1: (4.5, 1.0), 8: (0.6, 0.3)}[tp]
    for mebibytes, limit in zip((shape.speed, shape.memory), limits):
        extra = buffers.extra_bytes(
            used, shape.hidden, shape.vocab, 2, int(mebibytes * 2**20), cuda=True, total_rows=shape.rows
        )
        assert limit / 8 < extra / 2**30 <= limit
    assert linear.products(shape, run, shape.speed) == 3
    if shape.valid == 1:
        assert linear.products(shape, run, shape.memory) == 4


def test_products_are_those_that_run() -> None:
    """Against the plan of a call of the kernel itself, on the CPU."""
    for mebibytes, kept in ((8.0, True), (1.0, False)):
        shape = linear.Shape("", 64, 64, 8000, 0.5, mebibytes, mebibytes)
        hidden, weight = torch.randn(64, 64, requires_grad=True), torch.randn(8000, 64)
        target = torch.arange(64).index_fill(0, torch.arange(linear.ignored(shape)), -100)
        out = linear_logprob(hidden, weight, target, max_buffer_bytes=int(mebibytes * 2**20), backend="cpu")
        (node,) = {each for each in graph(out.logprobs_K) if "linear_logprob_stats" in each.name()}
        logits = node.saved_tensors[1]
        assert (logits.numel() > 0) == kept == (linear.products(shape, RUN, mebibytes) == 3)


def graph(tensor: torch.Tensor) -> set[Any]:
    """All nodes of a tensor's autograd graph."""
    found: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [each for each, _ in node.next_functions]
    return found
