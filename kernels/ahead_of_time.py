"""Compiles every Triton kernel for GPUs that are not there, and reads registers, spills and instructions off it.

    python -m tulu_hpc.kernels.ahead_of_time [--family NAME] [--architecture 90] [--json PATH]

A family's `triton_kernels.py` lists what to compile in `ahead_of_time() -> list[Case]`. Not to be run
under TRITON_INTERPRET. Exit code 1 when a case fails the gate: it does not compile, spills more than
`spills_allowed` says, or multiplies matrices without its architecture's tensor-core instruction.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_hpc.kernels.triton_support import interpreting

ARCHITECTURES = (80, 90, 100)
TENSOR_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# case -> architecture -> bytes of stack per thread that are accepted, by any version of Triton.
# fp32 attention multiplies without tensor cores, where each thread holds whole rows of both operands; at head dim 256
# its tiles are the smallest there are. It serves comparisons in fp32; training in bf16 does not run it.
_FP32_ATTENTION = {
    "packed_attention/forward/d64_g4_fp32": {80: 8},
    "packed_attention/key_gradient/d64_g4_fp32": {80: 32, 90: 16, 100: 16},
    "packed_attention/key_gradient/d128_g4_fp32": {90: 16, 100: 8},
    "packed_attention/query_gradient/d256_g4_fp32": {80: 184, 90: 216, 100: 240},
    "packed_attention/key_gradient_dk/d256_g4_fp32": {80: 200, 90: 208, 100: 208},
}
# Triton 3.6 alone, sm_80 and sm_100 alone: up to 18 registers, held in the L1 cache, with tiles that do not spill with
# later versions nor on sm_90. Other tiles wait for a measurement on these GPUs.
_TRITON_3_6 = {
    "linear_logprob/grad_hidden/fp32/softcap": {100: 8},
    "packed_attention/query_gradient/d64_g4": {100: 24},
    "packed_attention/query_gradient/d64_g4_fp16": {100: 24},
    "packed_attention/key_gradient/d64_g4": {80: 32},
    "packed_attention/key_gradient/d64_g4_fp16": {80: 32},
    "packed_attention/key_gradient/d64_g8_permuted": {80: 32},
    "packed_attention/forward/d128_g4": {80: 72},
    "packed_attention/forward/d128_g4_fp16": {80: 72},
    "packed_attention/forward/d128_g8_permuted": {100: 16},
    "packed_attention/key_gradient_dv/d256_g4": {100: 8},
    "packed_attention/key_gradient_dv/d256_g4_fp16": {100: 8},
    "packed_attention/key_gradient_dv/d256_g8_permuted": {100: 8},
}


def spills_allowed(case: str, architecture: int, triton_version: str) -> int:
    """Bytes of stack per thread that the gate accepts; 0 unless listed with a reason."""
    listed = dict(_FP32_ATTENTION)
    if triton_version.startswith("3.6."):
        listed |= _TRITON_3_6
        if case.startswith("preference_loss/"):  # a stack frame of 8 bytes; these kernels use 80 registers at most
            return 8
    return listed.get(case, {}).get(architecture, 0)


@dataclass(frozen=True)
class Case:
    """One kernel with everything its compilation depends on.

    Attributes:
        name: unique, "family/kernel/variant".
        kernel: the triton.jit function.
        signature: type of each run-time argument, such as "*bf16" or "i32"; all other arguments are in `constants`.
        constants: values of the constexpr arguments.
        aligned: arguments that are multiples of 16 (pointers, leading dimensions), as Triton would find at launch.
        tensor_core: the kernel multiplies matrices in half precision.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: Sequence[str] = ()
    tensor_core: bool = False


@dataclass
class Result:
    """What the compiler made of a case on one architecture. stack: bytes per thread (spills and local arrays)."""

    case: str
    architecture: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_instructions: int = 0
    problems: list[str] = field(default_factory=list)


def families() -> list[str]:
    """Kernel families with Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton_kernels.py"))


def cases(family: str) -> list[Case]:
    """What `family` wants compiled.

    Raises:
        ValueError: it has no Triton kernels.
    """
    if family not in families():
        raise ValueError(f"{family!r} has no Triton kernels; these have: {', '.join(families()) or 'none'}")
    module = importlib.import_module(f"tulu_hpc.kernels.{family}.triton_kernels")
    found: list[Case] = module.ahead_of_time()
    return found


def compile_case(case: Case, architecture: int) -> Result:
    """Compile one case and apply the gate; problems are in the result, nothing is raised for them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    result = Result(case.name, architecture)
    position = {name: index for index, name in enumerate(case.kernel.arg_names)}
    unknown = [name for name in (*case.signature, *case.constants, *case.aligned) if name not in position]
    if unknown or len(case.signature) + len(case.constants) != len(position):
        result.problems.append(f"arguments do not match those of the kernel: {unknown or sorted(position)}")
        return result
    source = ASTSource(
        fn=case.kernel,
        signature={**case.signature, **dict.fromkeys(case.constants, "constexpr")},
        constexprs={(position[name],): value for name, value in case.constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        result.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}")
        return result
    result.shared = compiled.metadata.shared
    result.registers, result.stack, code = _inspect(compiled.asm["cubin"])
    instruction = TENSOR_INSTRUCTION[architecture]
    result.tensor_instructions = len(re.findall(rf"\b{instruction}\b", code))
    allowed = spills_allowed(case.name, architecture, triton.__version__)
    if result.stack > allowed:
        result.problems.append(f"spills {result.stack} bytes per thread, allowed are {allowed}")
    if case.tensor_core and result.tensor_instructions == 0:
        result.problems.append(f"has no {instruction} instruction")
    return result


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack bytes and machine code, by the cuobjdump that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage[-300:]}")
    return int(match[1]), int(match[2]), code


def compile_all(family_names: Sequence[str], architectures: Sequence[int]) -> Iterator[Result]:
    """Every case of these families on these architectures.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where nothing is compiled.
    """
    if interpreting():
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter replaces the compiler")
    for family in family_names:
        for case in cases(family):
            for architecture in architectures:
                yield compile_case(case, architecture)


def main(arguments: list[str] | None = None) -> None:
    """Prints a table, then one JSON object; exits with 1 when a case has problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="may be given several times; default: all")
    parser.add_argument("--architecture", action="append", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--json", metavar="PATH", help="write the JSON object here as well")
    options = parser.parse_args(arguments)
    import triton

    print(f"{'case':58} {'sm':>4} {'registers':>9} {'stack':>6} {'shared':>7} {'tensor':>6}")
    results = []
    for result in compile_all(options.family or families(), options.architecture or ARCHITECTURES):
        results.append(result)
        print(
            f"{result.case:58} {result.architecture:>4} {result.registers:>9} {result.stack:>6} {result.shared:>7} "
            f"{result.tensor_instructions:>6}  {'; '.join(result.problems)}",
            flush=True,
        )
    text = json.dumps({"triton": triton.__version__, "results": [vars(result) for result in results]})
    if options.json:
        Path(options.json).write_text(text + "\n")
    print(text)
    if any(result.problems for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
