"""The compiled core: what it exports, what it was compiled for, and what happens without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tulu_hpc.kernels
from tulu_hpc.kernels import available_backends, build_info
from tulu_hpc.kernels.native import check, core

PACKAGE = Path(tulu_hpc.kernels.__file__).resolve().parent
ROOT = PACKAGE.parent
CUDA_MISSING = "the core was built without CUDA kernels (no nvcc, or TULU_HPC_CUDA=OFF)"


def test_only_the_c_abi_is_exported():
    if not shutil.which("nm"):
        pytest.skip("needs nm (binutils)")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(PACKAGE / "libtulu_core.so")], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    assert {"tulu_linear_logprob_forward_cpu", "tulu_linear_logprob_backward_cpu"} <= names
    assert all(name.startswith("tulu_") for name in names), sorted(names)


def test_core_links_neither_torch_nor_python():
    if not shutil.which("ldd"):
        pytest.skip("needs ldd")
    listing = subprocess.run(
        ["ldd", str(PACKAGE / "libtulu_core.so")], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"torch|python|cudart|libcuda|blas|mkl", listing), listing


def test_cuda_kernels_are_in_the_library():
    if not build_info()["cuda"]:
        pytest.skip(CUDA_MISSING)
    library = (PACKAGE / "libtulu_core.so").read_bytes()
    for name in (b"tulu_linear_logprob_forward_cuda", b"tulu_linear_logprob_backward_cuda", b".nv_fatbin"):
        assert name in library
    assert hasattr(core(), "linear_logprob_forward_cuda")


def test_cuda_kernels_compile_for_every_architecture_without_spills(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs nvcc and the source tree")
    architectures = {"80": "sm_80", "90a": "sm_90a", "100a": "sm_100a"}
    (source,) = (ROOT / "csrc/cuda").glob("*.cu")  # another file needs a count of its own below
    command = [nvcc, "-std=c++17", "-fatbin", "-DTULU_WITH_CUDA", f"-I{ROOT / 'csrc/include'}", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command += [str(source), "-o", str(tmp_path / "kernels.fatbin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == set(architectures.values())
    assert len(kernels) == 3 * 8, done.stderr
    for name, arch, stores, loads, registers in kernels:
        # 512 threads a block, two blocks an SM: at most 64 of its 65536 registers each.
        assert int(stores) == int(loads) == 0 and int(registers) <= 64, (name, arch, stores, loads, registers)


def test_error_codes_become_messages():
    with pytest.raises(RuntimeError, match=r"the op failed: invalid sizes \(code -1\)"):
        check(core().linear_logprob_forward_cpu(0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 1.0, 0.0, 1), "the op")
    assert core().set_cpu_isa("mmx") != 0


@pytest.fixture
def copy_without_core(tmp_path):
    """The Python files as an uninstalled user has them: nothing compiled."""
    package = tmp_path / "tulu_hpc"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copytree(PACKAGE, package / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def run_without_core(directory: Path, code: str) -> subprocess.CompletedProcess:
    program = f"import sys; sys.path.insert(0, {str(directory)!r})\nimport torch\nimport tulu_hpc.kernels as k\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=directory)


def test_without_the_compiled_core(copy_without_core):
    """The package imports, says what is missing and how to get it, and the reference backend runs."""
    call = "k.linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0])"
    program = f"""
print(k.available_backends('linear_logprob')['cpu'])
print({call}, backend='reference'))
try:
    {call})
except k.BackendError as error:
    print('refused:', error)
"""
    done = run_without_core(copy_without_core, program)
    assert done.returncode == 0, done.stderr
    status, result, refusal = done.stdout.splitlines()
    assert "not built" in status and "pip install -e ." in status
    assert "-1.0986" in result
    assert refusal.startswith("refused: linear_logprob: backend 'cpu' cannot run: the compiled core")


def test_kernels_import_nothing_of_tulu_hpc():
    pattern = re.compile(r"^\s*(?:from|import)\s+tulu_hpc(?!\.kernels)", re.MULTILINE)
    files = [p for p in PACKAGE.rglob("*.py")]
    assert len(files) > 10
    assert [str(p) for p in files if pattern.search(p.read_text())] == []


def test_gpu_tests_and_benchmarks_need_the_kernels_alone():
    """A GPU node without internet has torch, Triton and what benchmarks/offline_wheels.sh collects."""
    names = [f"tests.gpu.{path.stem}" for path in (ROOT / "tests/gpu").glob("test_*.py")]
    names += [f"tulu_hpc.kernels.{path.parent.name}.bench" for path in (ROOT / "kernels").glob("*/bench.py")]
    program = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
print(sorted({{name.split(".")[1] for name in sys.modules if name.startswith("tulu_hpc.")}}))
print([name for name in ("megatron", "transformers", "pydantic", "yaml", "typer") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(names) == 8 and done.stdout.splitlines() == ["['kernels']", "[]"]


def test_every_op_lists_its_backends():
    for op in ("linear_logprob", "packed_attention", "preference_loss", "policy_loss", "value_loss", "gae"):
        backends = available_backends(op)
        assert backends["reference"] == "usable" and all(backends.values())
    with pytest.raises(ValueError, match="unknown op 'none'"):
        available_backends("none")


@pytest.mark.parametrize("value, message", [("ON", "there is no CUDA compiler"), ("MAYBE", "must be AUTO, ON or OFF")])
def test_bad_cuda_setting_is_a_clear_error(tmp_path, value, message):
    """cmake alone: ON without a CUDA compiler, and a wrong word."""
    if not (ROOT / "CMakeLists.txt").exists() or not shutil.which("cmake"):
        pytest.skip("needs the source tree and cmake")
    environment = {**os.environ, "CUDACXX": str(tmp_path / "no-such-nvcc")}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DTULU_CUDA={value}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stderr), done.stderr
