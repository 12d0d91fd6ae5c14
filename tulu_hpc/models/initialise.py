"""A randomly initialised Llama as a Hugging Face directory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.companions import write_config
from tulu_hpc.models.names import EMBEDDING, HEAD, hf_shapes
from tulu_hpc.models.safetensors_files import published, write_shards


def random_tensors(
    architecture: Architecture,
    *,
    seed: int,
    embedding_std: float,
    linear_std: float,
    scale_residual_outputs: bool,
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, fp32 tensor), one at a time; each from a generator of its own, so that no tensor depends on
    which others exist."""
    for name, shape in hf_shapes(architecture).items():
        if len(shape) == 1:
            yield name, torch.ones(shape)
            continue
        std = embedding_std if name in (EMBEDDING, HEAD) else linear_std
        if scale_residual_outputs and name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * architecture.num_hidden_layers)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield name, torch.empty(shape).normal_(0.0, std, generator=generator)


def random_hf_model(
    architecture: Architecture,
    output: str | Path,
    *,
    seed: int,
    embedding_std: float = 0.02,
    linear_std: float = 0.02,
    scale_residual_outputs: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a random model; the directory appears, or replaces an older one, only when complete.

    Args:
        embedding_std, linear_std: standard deviations of embedding and head, and of all other matrices; norms are 1.
        scale_residual_outputs: divide the std of o_proj and down_proj by sqrt(2 x layers) [GPT-2].
        seed: decides every weight.
    """
    with published(Path(output)) as staging:
        tensors = random_tensors(
            architecture,
            seed=seed,
            embedding_std=embedding_std,
            linear_std=linear_std,
            scale_residual_outputs=scale_residual_outputs,
        )
        write_shards(tensors, staging, hf_shapes(architecture), dtype, max_shard_bytes)
        write_config(staging, architecture, dtype)
