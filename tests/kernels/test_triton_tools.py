"""The interpreter's trap with bf16, the rule that keeps kernels out of it, and the gate on compiled kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tulu_hpc.kernels import triton_support

pytest.importorskip("triton", reason="triton is not installed")
REPOSITORY = Path(__file__).parents[2]
KERNELS = REPOSITORY / "kernels"


@pytest.mark.parametrize("through_helper", [True, False])
def test_bf16_products(through_helper: bool) -> None:
    from tests.kernels.triton_examples import product

    size = 32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).bfloat16() for _ in range(2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.zeros(size, size, device=device)
    product[(1,)](a.to(device), b.to(device), out, SIZE=size, THROUGH_HELPER=through_helper)
    close = torch.allclose(out.cpu().double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert close is (through_helper or not triton_support.interpreting())


def test_kernels_multiply_through_the_helper() -> None:
    files = [path for path in KERNELS.rglob("*.py") if path.name != "triton_dot.py"]
    assert len(files) > 10
    assert not [path for path in files if re.search(r"\btl\.dot\b", path.read_text())]


PROGRAM = """
import json, sys
from tests.kernels.triton_examples import product, spilling
from tulu_hpc.kernels.ahead_of_time import Case, compile_case

plain = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
whole = {"a": "*fp32", "b": "*fp32", "out": "*fp32"}
constants = {"SIZE": 64, "THROUGH_HELPER": True}
cases = [
    Case("good", product, plain, constants, tensor_core=True, aligned=("a", "b", "out")),
    Case("no tensor core", product, whole, constants, tensor_core=True),
    Case("spills", spilling, {"a": "*fp32", "out": "*fp32"}, {"SIZE": 128}, num_warps=1),
    Case("wrong arguments", product, {"a": "*bf16"}, constants),
    Case("wrong type", product, {**plain, "b": "*i64"}, constants),
]
print(json.dumps([vars(compile_case(case, 90)) for case in cases]))
"""


def test_every_kernel_that_is_launched_is_compiled() -> None:
    from tulu_hpc.kernels import ahead_of_time

    text = "\n".join(path.read_text() for path in KERNELS.rglob("*.py"))
    kernels = re.findall(r"@triton\.jit\b.*\ndef (\w+)", text)
    launched = {name for name in kernels if re.search(rf"\b{name}\[", text)}
    compiled = {case.kernel.fn.__name__ for family in ahead_of_time.families() for case in ahead_of_time.cases(family)}
    assert len(launched) >= 14 and launched == compiled


def test_the_gate() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    good, no_tensor_core, spills, arguments, wrong_type = json.loads(result.stdout.splitlines()[-1])
    assert good["problems"] == [] and good["tensor_instructions"] > 0 and 0 < good["registers"] <= 255
    assert no_tensor_core["problems"][-1] == "has no HGMMA instruction"
    assert len(spills["problems"]) == 1 and spills["problems"][0].startswith("spills ") and spills["stack"] > 0
    assert "do not match" in arguments["problems"][0]
    assert wrong_type["problems"][0].startswith("does not compile: ")


def test_accepted_spills_are_few_and_named() -> None:
    """Every entry names a case that is compiled; bf16 and fp16 spill with Triton 3.6 alone, 18 registers at most."""
    from tulu_hpc.kernels import ahead_of_time

    names = {case.name for family in ahead_of_time.families() for case in ahead_of_time.cases(family)}
    for listed, most in ((ahead_of_time._FP32_ATTENTION, 240), (ahead_of_time._TRITON_3_6, 72)):
        assert names.issuperset(listed) and max(max(found.values()) for found in listed.values()) == most
    assert all(name.endswith("_fp32") for name in ahead_of_time._FP32_ATTENTION)
    assert ahead_of_time.spills_allowed("packed_attention/forward/d128_g4", 80, "3.6.0") == 72
    assert ahead_of_time.spills_allowed("packed_attention/forward/d128_g4", 80, "3.9.0") == 0
    assert ahead_of_time.spills_allowed("packed_attention/forward/d128_g4", 90, "3.6.0") == 0
    assert [ahead_of_time.spills_allowed("preference_loss/any", 90, version) for version in ("3.6.0", "3.9.0")] == [
        8,
        0,
    ]


def test_all_kernels_pass_the_gate(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tulu_hpc.kernels.ahead_of_time", "--json", str(tmp_path / "table.json")]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr


def test_under_the_interpreter_nothing_is_compiled() -> None:
    from tulu_hpc.kernels.ahead_of_time import compile_all

    if not triton_support.interpreting():
        pytest.skip("needs TRITON_INTERPRET=1, which a GPU machine does not set")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        next(compile_all(["none"], [90]))
