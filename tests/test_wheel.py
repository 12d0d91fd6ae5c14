"""An installed wheel: real files behind the link, the compiled core, and the configurations that verbs look up."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources (so that the checkout's build/ stays as it is), unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = shutil.ignore_patterns(
        ".venv*", ".git", "build", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    environment = {"TULU_HPC_CUDA": "OFF", "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A program away from the checkout; the unpacked wheel comes first on the path."""
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=site.parent, timeout=200
    )


def test_kernels_are_real_files_with_a_working_core(installed: Path) -> None:
    assert not (installed / "tulu_hpc" / "kernels").is_symlink()
    program = (
        "import torch, tulu_hpc.kernels as k\n"
        "print(k.__file__)\n"
        "out = k.linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend='cpu')\n"
        "print(out.logprobs_K.item())"
    )
    done = run(installed, "-c", program)
    assert done.returncode == 0, done.stderr
    where, value = done.stdout.split()
    assert where.startswith(str(installed)) and abs(float(value) + 1.0986123) < 1e-6


def test_configurations_are_found_without_a_checkout(installed: Path) -> None:
    done = run(installed, "-m", "tulu_hpc", "sft", "configs/tulu3/8b/sft.yaml", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "vocab_size: 128256" in done.stdout
