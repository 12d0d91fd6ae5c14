"""The doctor's report: complete, true for what is installed, and with a command for what is not."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from tulu_hpc.diagnostics import benchmark_plots, benchmarks, doctor


def test_report_has_every_part() -> None:
    text = doctor.report()
    for word in ("versions", "machine", "devices", "kernels", "engines", "processes", *doctor.KERNEL_FAMILIES):
        assert word in text
    assert importlib.metadata.version("torch") in text
    assert "None" not in text


def test_what_is_missing_comes_with_a_command() -> None:
    for engine in doctor.engines():
        line = doctor._engine_line(engine)
        if engine.found:
            assert engine.found in line
        else:
            assert engine.gives in line and engine.install in line


def test_programs_are_looked_for_in_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._program("nvcc", "--version") == ""
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho one\necho release 12.9\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert doctor._program("nvcc", "--version") == f"release 12.9 ({tmp_path}/nvcc)"


def test_every_reported_kernel_state_is_the_registrys() -> None:
    from tulu_hpc.kernels import available_backends

    text = "\n".join(doctor.kernels())
    for family in doctor.KERNEL_FAMILIES:
        for name, state in available_backends(family).items():
            assert name in text and (state == "usable" or state in text)


def test_unknown_benchmark_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no benchmark named 'none'; there are: "):
        benchmarks.run("none", [])


def test_all_benchmarks_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the smallest family alone; each family's own benchmark is run by its tests."""
    monkeypatch.setattr(benchmarks, "families", lambda: ["gae"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    benchmarks.run("kernels", ["--quick", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "kernels.json").read_text())["gae"]
    assert found["torch"] and found["mode"] == "quick"
    measured = [line for line in found["lines"] if line["ms"] is not None]
    assert {line["kernel"] for line in measured} >= {"copy", "eager", "ours cpu", "ours reference"}
    table = (tmp_path / "out" / "kernels.md").read_text()
    assert table.count("\n|") == 2 + len(measured)
    plot = (tmp_path / "out" / "plots" / "gae_1.svg").read_text()
    assert plot.startswith("<svg") and "(plots/gae_1.svg)" in table
    with pytest.raises(ValueError, match="unknown arguments --slow"):
        benchmarks.run("kernels", ["--slow"])


def test_a_failing_benchmark_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "families", lambda: ["none", "gae"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(RuntimeError, match="the benchmarks of none failed"):
        benchmarks.run("kernels", ["--quick", "--skip", "eager", "--output", str(tmp_path)])
    (result,) = json.loads((tmp_path / "kernels.json").read_text()).values()
    notes = {line["kernel"]: line["note"] for line in result["lines"]}
    assert notes["eager"] == "not measured: left out by --skip" and not notes["ours cpu"]


def test_plots_of_the_benchmarks() -> None:
    """A plot has what was measured, in the last pass of a shape; long names share no plot."""

    def line(shape: str, step: str, kernel: str, roofline: float | None, extra: float | None = 0.0) -> dict[str, Any]:
        return {"shape": shape, "pass": step, "kernel": kernel, "roofline": roofline, "extra_MiB": extra}

    lines = [line("small", "forward", "flex", 0.5), line("small", "both", "ours cpu", 0.7)]
    lines += [line("small", "both", "copy", 1.0, None), line("small", "both", "cudnn", None)]
    lines += [line("long " * 8 + str(number), "both", "ours cpu", 0.3) for number in range(2)]
    found = benchmark_plots.plots("rope", lines)
    assert list(found) == ["rope_1.svg", "rope_2.svg"]
    text = found["rope_1.svg"]
    assert "ours cpu" in text and "small" in text and not any(name in text for name in ("flex", "copy", "cudnn"))
