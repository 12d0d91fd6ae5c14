"""Transformer Engine's linear layers and norms in megatron's layer spec; attention and head stay ours.

Imported only where they are asked for. What is passed to megatron-core 0.16.1 is written down here and nowhere else.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from tulu_hpc.kernels.schema import Wanted, differences, parameters_of

_INITIALIZE_UB = Wanted(
    "initialize_ub",
    ("shape", "tp_size"),
    ("quantization_modes", "dtype", "bootstrap_backend"),
    {"ub_cfgs": None, "with_cublasmp": False},
)
# Rows and hidden size that this process's communication buffers were made for; there is one set per process.
_buffers: tuple[int, int] | None = None


class LayerSpecError(RuntimeError):
    """The layers that model.layer_spec asks for cannot be had here; the message says why."""


@dataclass(frozen=True)
class TransformerEngineOptions:
    """How Transformer Engine's layers run.

    Attributes:
        fp8: format of fp8 GEMMs, None for the parameters' dtype.
        fp8_recipe: how tensors are scaled.
        overlap_rows: rows of a pack on one context-parallel rank, the same in every pack, to overlap tensor-parallel
            communication with GEMMs; None: no overlap.
    """

    fp8: Literal["e4m3", "hybrid"] | None = None
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    overlap_rows: int | None = None


def check_layers(layer_spec: Literal["local", "transformer_engine"]) -> None:
    """Whether the layers can be imported; called before anything that takes time.

    Raises:
        LayerSpecError: Transformer Engine is asked for and is missing or broken, or megatron-core does not accept it.
    """
    if layer_spec == "local":
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as reason:  # without a driver or cuDNN its import raises anything
        raise LayerSpecError(
            "model.layer_spec: transformer_engine needs the package transformer-engine with its PyTorch part, which "
            f"cannot be imported here: {type(reason).__name__}: {reason}. Install tulu_hpc[gpu] on a machine with "
            "CUDA, or set model.layer_spec: local"
        ) from reason
    if not importlib.import_module("megatron.core.extensions.transformer_engine").HAVE_TE:
        raise LayerSpecError(
            "model.layer_spec: transformer_engine: Transformer Engine can be imported, but this megatron-core does not "
            "find what it needs in it (transformer_engine.pytorch.fp8). Install another version, or use local"
        )


def check_device(device: torch.device) -> None:
    """Whether the layers run there (on "meta" they only have shapes).

    Raises:
        LayerSpecError: the device is a CPU.
    """
    if device.type == "cpu":
        raise LayerSpecError("model.layer_spec: transformer_engine runs on CUDA, this process trains on the CPU")


def layers() -> tuple[ModuleSpec, type, dict[type, int]]:
    """A transformer layer, the norm after the last one, and the dimension that tensor-parallel ranks split by type."""
    check_layers("transformer_engine")
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    split: dict[type, int] = {TELayerNormColumnParallelLinear: 0, TERowParallelLinear: 1}
    return get_gpt_layer_with_transformer_engine_spec(), TENorm, split


def config_options(options: TransformerEngineOptions) -> dict[str, Any]:
    """What goes into megatron's TransformerConfig."""
    return {
        "fp8": options.fp8,
        "fp8_recipe": options.fp8_recipe,
        "tp_comm_overlap": options.overlap_rows is not None,
        # Weights are quantised in every call: a cached copy would be stale where weights change between direct calls.
        "disable_parameter_transpose_cache": True,
    }


def start_overlap(options: TransformerEngineOptions, hidden_size: int, tensor: int, dtype: torch.dtype) -> None:
    """Make the communication buffers, once per process; collective over the job.

    Raises:
        LayerSpecError: they were made for another shape, or this Transformer Engine makes them in another way.
    """
    global _buffers
    if options.overlap_rows is None or _buffers == (options.overlap_rows, hidden_size):
        return
    if _buffers is not None:
        raise LayerSpecError(
            f"parallel.tp_comm_overlap: this process has buffers for {_buffers[0]} rows of {_buffers[1]}, and cannot "
            f"make others for {options.overlap_rows} rows of {hidden_size}"
        )
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    if problems := differences(parameters_of(base.initialize_ub), _INITIALIZE_UB):
        version = getattr(importlib.import_module("transformer_engine"), "__version__", "of unknown version")
        raise LayerSpecError(
            f"parallel.tp_comm_overlap: transformer-engine {version}: initialize_ub is not the function this "
            f"version was written for: {problems[0]}"
        )
    mode = base.UserBufferQuantizationMode
    base.initialize_ub(
        (options.overlap_rows, hidden_size),
        tensor,
        quantization_modes=[mode.NONE if options.fp8 is None else mode.FP8],
        dtype=dtype,
        bootstrap_backend="nccl",
    )
    _buffers = (options.overlap_rows, hidden_size)
