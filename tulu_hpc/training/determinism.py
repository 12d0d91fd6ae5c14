"""Same numbers from the same seed: kernels, generators and CPU threads."""

from __future__ import annotations

import os
import random

import torch
import xxhash

from tulu_hpc.parallel.device import default_device


def local_processes() -> int:
    """Processes of this job on this machine (torchrun says so; 1 without it)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def configure(*, deterministic: bool, threads: int | None) -> None:
    """Set CPU threads (default: the cores shared among the local processes); refuse non-deterministic kernels or not.

    Call before the first tensor operation: cuBLAS reads its workspace setting once.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Filling every new buffer costs a pass over memory; nothing here reads one before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // local_processes()))


def rng_state() -> dict[str, object]:
    """State of every generator of this process: python, torch (CPU), CUDA, megatron's tracker."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    state: dict[str, object] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if default_device().type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    state["tracker"] = get_cuda_rng_tracker().get_states()
    return state


def set_rng_state(state: dict[str, object]) -> None:
    """Restore what `rng_state` returned (same layout, same rank)."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.setstate(state["python"])  # type: ignore[arg-type]
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])  # type: ignore[arg-type]
    get_cuda_rng_tracker().set_states(state["tracker"])


def fingerprint() -> int:
    """A number that the states of this process's python and torch (CPU) generators determine."""
    torch_state = torch.get_rng_state().numpy().tobytes()
    return xxhash.xxh3_64_intdigest(repr(random.getstate()).encode() + torch_state) % 2**31


def seed_all(seed: int) -> None:
    """Seed every generator as the start of a run does (the same on all ranks; megatron derives the tensor-parallel
    streams)."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
