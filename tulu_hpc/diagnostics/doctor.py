"""What this machine has, what that makes usable, and for what is missing: what it would give and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

import tulu_hpc

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "tensorboard")
KERNEL_FAMILIES = ("linear_logprob", "packed_attention", "preference_loss", "policy_loss", "value_loss", "gae", "rope")


@dataclass(frozen=True)
class Engine:
    """Something optional. `found` says where or which version; empty if missing."""

    name: str
    found: str
    gives: str
    install: str


def report() -> str:
    """The whole text of `tulu-hpc doctor`."""
    parts = [
        ("versions", versions()),
        ("machine", machine()),
        ("devices", devices()),
        ("kernels", kernels()),
        ("engines", [_engine_line(engine) for engine in engines()]),
    ]
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts)


def versions() -> list[str]:
    """Of this package, Python and the main dependencies."""
    lines = [f"{'tulu-hpc':16} {tulu_hpc.__version__}", f"{'python':16} {platform.python_version()} {sys.executable}"]
    for name in PACKAGES:
        lines.append(f"{name:16} {_version(name) or f'missing: pip install {name}'}")
    return lines


def machine() -> list[str]:
    """Cores, memory and the processes of a torchrun job if there is one."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    world = os.environ.get("WORLD_SIZE")
    job = f"rank {os.environ.get('RANK')} of {world} (torchrun)" if world else "1 (start more with torchrun)"
    return [
        f"{'system':16} {platform.platform()}",
        f"{'cores':16} {cores} usable of {os.cpu_count()}",
        f"{'memory':16} {memory.available / 2**30:.1f} GiB available of {memory.total / 2**30:.1f} GiB",
        f"{'processes':16} {job}",
    ]


def devices() -> list[str]:
    """GPUs, or that the CPU does the work."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"torch is built for CUDA {built} but sees no GPU" if built else "torch is built without CUDA"
        lines = [f"{'cpu':16} used, with gloo; {reason}"]
        if shutil.which("nvidia-smi") and not built:
            lines.append("there is an NVIDIA driver: install the CUDA build of torch with constraints/ for GPUs")
        return lines
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append(f"{f'cuda:{index}':16} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "not available"
    return [*lines, f"{'nccl':16} {nccl}, CUDA {torch.version.cuda}"]


def kernels() -> list[str]:
    """Per kernel family: usable backends, and why the others are not."""
    from tulu_hpc.kernels import available_backends

    lines = []
    for family in KERNEL_FAMILIES:
        backends = available_backends(family)
        usable = [name for name, state in backends.items() if state == "usable"]
        lines.append(f"{family:16} {', '.join(usable) or 'none'}")
        lines += [f"{'':16} {name}: {state}" for name, state in backends.items() if state != "usable"]
    return lines


def engines() -> list[Engine]:
    """Everything optional, present or not."""
    return [
        Engine("embedded", "built in (rollout.engine)", "rollouts on the training model", "pip install tulu_hpc"),
        Engine("nvcc", _program("nvcc", "--version"), "CUDA kernels of our own (linear_logprob)",
               "install the CUDA toolkit, then pip install -e . (TULU_HPC_CUDA=ON makes a missing nvcc an error)"),
        Engine("triton", _version("triton"), "torch.compile on GPUs",
               "pip install triton (GPU builds of torch bring it)"),
        Engine("flash-attn", _version("flash-attn"),
               "FlashAttention 2 for backend flash of packed_attention",
               "pip install 'tulu_hpc[gpu]' (needs CUDA)"),
        Engine("transformer-engine", _version("transformer-engine"),
               "model.layer_spec: transformer_engine (fp8), megatron's multi-tensor gradient norm and clipping",
               "pip install 'tulu_hpc[gpu]' (needs CUDA)"),
        Engine("slurm", _program("sbatch", "--version"), "`tulu-hpc launch`",
               "use a login node of a cluster; for tests: apt-get install slurm-wlm munge"),
        Engine("datasets", _version("datasets"), "Hugging Face dataset ids as data.path",
               "pip install 'tulu_hpc[datasets]'"),
        Engine("wandb", _version("wandb"), "telemetry.wandb", "pip install 'tulu_hpc[wandb]'"),
        Engine("langdetect", _version("langdetect"), "IFEval's response_language check",
               "pip install 'tulu_hpc[eval]'"),
    ]  # fmt: skip


def _engine_line(engine: Engine) -> str:
    if engine.found:
        return f"{engine.name:18} {engine.found}"
    return f"{engine.name:18} missing; would give {engine.gives}: {engine.install}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _program(name: str, *arguments: str) -> str:
    """Path of a program and the last line of its version text, or nothing."""
    path = shutil.which(name)
    return f"{_output([path, *arguments])} ({path})".strip() if path else ""


def _output(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = result.stdout.strip().splitlines()
    return lines[-1] if result.returncode == 0 and lines else ""
