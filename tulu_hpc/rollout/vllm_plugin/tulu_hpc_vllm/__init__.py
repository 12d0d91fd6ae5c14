"""Plugin for vLLM: weight updates over gloo and NCCL, and processes that do not outlive their parent."""

from __future__ import annotations

import os

ENGINES = {"tulu_hpc_gloo": ("tulu_hpc_vllm.gloo", "GlooEngine"), "tulu_hpc_nccl": ("tulu_hpc_vllm.nccl", "NcclEngine")}


def register() -> None:
    """Called by vLLM in its API server, engine core and workers, possibly more than once in each."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for backend, engine in ENGINES.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, *engine)
    # Only under our supervisor: elsewhere the parent may be a shell that is meant to leave.
    if os.environ.get("TULU_HPC_VLLM_SUPERVISED"):
        from tulu_hpc_vllm.lifetime import die_with_parent

        die_with_parent()
        os.register_at_fork(after_in_child=die_with_parent)
