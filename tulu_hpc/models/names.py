"""Names and layouts of weights: Hugging Face on one side, megatron-core on the other.

| megatron                    | Hugging Face                   | split over tensor-parallel ranks                   |
|-----------------------------|--------------------------------|----------------------------------------------------|
| embedding.word_embeddings   | embed_tokens                   | rows, padded                                       |
| input_layernorm             | input_layernorm                | no                                                 |
| self_attention.linear_qkv   | q_proj, k_proj, v_proj         | by key/value head: its query heads, key, value     |
| self_attention.linear_proj  | o_proj                         | columns                                            |
| pre_mlp_layernorm           | post_attention_layernorm       | no                                                 |
| mlp.linear_fc1              | gate_proj, up_proj             | rows of each: [gate_r; up_r]                       |
| mlp.linear_fc2              | down_proj                      | columns                                            |
| final_layernorm             | norm                           | no                                                 |
| output_layer                | lm_head (tied: embed_tokens)   | rows, padded                                       |
| score (scalar head)         | score                          | no                                                 |

Transformer Engine's layers hold the norm before them: self_attention.linear_qkv.layer_norm_weight is input_layernorm,
mlp.linear_fc1.layer_norm_weight is pre_mlp_layernorm. Their `_extra_state` holds fp8 scales, which are no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.host_tensors import host_empty
from tulu_hpc.models.scalar_head import Head

Kind = Literal["vocab", "qkv", "gate_up", "columns", "whole"]
Reader = Callable[[str, tuple[slice, ...]], Tensor]

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"
# Buffers that old checkpoints carry and that hold nothing of the model.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq$")

_LAYER: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "input_layernorm.weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (
        "qkv",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.linear_proj.weight": ("columns", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("columns", ("mlp.down_proj.weight",)),
}

# Of our own layers; Transformer Engine's names, which checkpoints of either have (`stored_names`), are the others.
LAYER_PARAMETERS = tuple(name for name in _LAYER if not name.endswith("layer_norm_weight"))


@dataclass(frozen=True)
class Mapping:
    """Where one megatron parameter lives in a Hugging Face model.

    Attributes:
        kind: how it is assembled and split.
        hf_names: its parts there, in order.
        order: sorts parameters as the model runs: embedding, layers, norm, head.
    """

    kind: Kind
    hf_names: tuple[str, ...]
    order: tuple[int, int]


def mapping(name: str, layer_offset: int, architecture: Architecture) -> Mapping:
    """The mapping of a parameter of one model chunk.

    Args:
        name: as in `Llama.named_parameters()`; layers count from 0 inside the chunk.
        layer_offset: number of the chunk's first layer in the model.

    Raises:
        ValueError: a parameter this table does not know.
    """
    layers = architecture.num_hidden_layers
    if name == "embedding.word_embeddings.weight":
        return Mapping("vocab", (EMBEDDING,), (-1, 0))
    if name == "decoder.final_layernorm.weight":
        return Mapping("whole", (NORM,), (layers, 0))
    if name == "output_layer.weight":
        return Mapping("vocab", (EMBEDDING if architecture.tie_word_embeddings else HEAD,), (layers, 1))
    if name == "score.weight":
        return Mapping("whole", (SCORE,), (layers, 2))
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if name.endswith("._extra_state"):
        raise ValueError(f"{name!r} holds fp8 scales of Transformer Engine, not a weight: it has no Hugging Face name")
    if match is None or match[2] not in _LAYER:
        raise ValueError(f"parameter {name!r} has no Hugging Face name")
    kind, parts = _LAYER[match[2]]
    layer = int(match[1]) + layer_offset
    return Mapping(kind, tuple(f"model.layers.{layer}.{part}" for part in parts), (layer, list(_LAYER).index(match[2])))


def hf_shapes(architecture: Architecture, head: Head = "logprobs") -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model with its shape, in the order the model runs (tied: without lm_head)."""
    a = architecture
    query, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (a.hidden_size,),
        "self_attn.q_proj.weight": (query, a.hidden_size),
        "self_attn.k_proj.weight": (kv, a.hidden_size),
        "self_attn.v_proj.weight": (kv, a.hidden_size),
        "self_attn.o_proj.weight": (a.hidden_size, query),
        "post_attention_layernorm.weight": (a.hidden_size,),
        "mlp.gate_proj.weight": (a.intermediate_size, a.hidden_size),
        "mlp.up_proj.weight": (a.intermediate_size, a.hidden_size),
        "mlp.down_proj.weight": (a.hidden_size, a.intermediate_size),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (a.vocab_size, a.hidden_size)}
    for index in range(a.num_hidden_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes[NORM] = (a.hidden_size,)
    if head == "value":
        shapes[SCORE] = (1, a.hidden_size)
    elif not a.tie_word_embeddings:
        shapes[HEAD] = (a.vocab_size, a.hidden_size)
    return shapes


def read_local(
    mapped: Mapping, read: Reader, shape: torch.Size, rank: int, size: int, architecture: Architecture
) -> Tensor:
    """Assemble one rank's part of a parameter from slices of the Hugging Face tensors.

    Args:
        read: (name, slices) -> that part of the tensor.
        shape: of the local parameter.
        rank, size: tensor-parallel.
    """
    a = architecture
    if mapped.kind == "whole":
        return read(mapped.hf_names[0], (slice(None),))
    if mapped.kind == "vocab":
        start = min(rank * shape[0], a.vocab_size)
        rows = read(mapped.hf_names[0], (slice(start, min(start + shape[0], a.vocab_size)),))
        return torch.cat((rows, rows.new_zeros(shape[0] - rows.shape[0], shape[1])))  # padding rows are zero
    if mapped.kind == "columns":
        return read(mapped.hf_names[0], (slice(None), slice(rank * shape[1], (rank + 1) * shape[1])))
    if mapped.kind == "gate_up":
        half = shape[0] // 2
        return torch.cat([read(name, (slice(rank * half, (rank + 1) * half),)) for name in mapped.hf_names])
    heads = a.num_key_value_heads // size
    parts = []
    for name, width in zip(mapped.hf_names, qkv_widths(a), strict=True):
        part = read(name, (slice(rank * heads * width, (rank + 1) * heads * width),))
        parts.append(part.view(heads, width, a.hidden_size))
    return torch.cat(parts, dim=1).reshape(-1, a.hidden_size)


def merge_shards(mapped: Mapping, shards: list[Tensor], architecture: Architecture) -> list[Tensor]:
    """The Hugging Face tensors of a parameter from its tensor-parallel shards (on the host); inverse of `read_local`.

    They may be views of a single shard.
    """
    if mapped.kind == "whole" or (len(shards) == 1 and mapped.kind != "qkv"):
        whole = shards[0][: architecture.vocab_size] if mapped.kind == "vocab" else shards[0]
        return list(whole.chunk(2)) if mapped.kind == "gate_up" else [whole]
    merged = Merged(mapped, tuple(shards[0].shape), shards[0].dtype, len(shards), architecture)
    for rank, shard in enumerate(shards):
        merged.add(rank, shard)
    return merged.tensors


class Merged:
    """Hugging Face tensors of one parameter, filled with one tensor-parallel shard after the other.

    Args:
        shape, dtype: of a shard.
        size: number of shards.

    Attributes:
        tensors: the result, on the host; whole once every shard is in its place.
    """

    def __init__(
        self, mapped: Mapping, shape: tuple[int, ...], dtype: torch.dtype, size: int, architecture: Architecture
    ) -> None:
        rows, columns = shape
        self._heads = architecture.num_key_value_heads // size if mapped.kind == "qkv" else 1
        parts = {"gate_up": (rows // 2, rows // 2), "qkv": qkv_widths(architecture)}
        self._widths = parts.get(mapped.kind, (rows,))  # rows of each tensor, per head
        if mapped.kind == "columns":
            whole = [host_empty((rows, size * columns), dtype)]
        else:
            whole = [host_empty((size * self._heads * width, columns), dtype) for width in self._widths]
        self._places = [each.chunk(size, dim=1 if mapped.kind == "columns" else 0) for each in whole]
        self.tensors = [each[: architecture.vocab_size] for each in whole] if mapped.kind == "vocab" else whole

    def place(self, rank: int) -> Tensor | None:
        """Where the shard of a rank can be received as it is; None: it has to be added."""
        first = self._places[0][rank]
        return first if len(self._places) == 1 and first.is_contiguous() else None

    def add(self, rank: int, shard: Tensor) -> None:
        """Copy the shard of a rank to its place."""
        parts = shard.view(self._heads, -1, shard.shape[1]).split(self._widths, dim=1)
        for places, part in zip(self._places, parts, strict=True):
            places[rank].view(part.shape).copy_(part)


def qkv_widths(a: Architecture) -> tuple[int, int, int]:
    """Rows of q, k and v per key/value head."""
    return a.num_attention_heads // a.num_key_value_heads * a.head_dim, a.head_dim, a.head_dim
