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
    """The Hugging Face tensors of a parameter from its tensor-parallel shards; the inverse of `read_local`.

    They may be views of a single shard.
    """
    a = architecture
    if mapped.kind == "whole":
        return [shards[0]]
    if mapped.kind == "vocab":
        return [_joined(shards)[: a.vocab_size]]
    if mapped.kind == "columns":
        return [_joined(shards, dim=1)]
    if mapped.kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[i] for half in halves]) for i in range(2)]
    grouped = _joined(shards).view(a.num_key_value_heads, sum(qkv_widths(a)), a.hidden_size)
    return [part.reshape(-1, a.hidden_size) for part in grouped.split(list(qkv_widths(a)), dim=1)]


def _joined(shards: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` that does not copy a single tensor."""
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)


def qkv_widths(a: Architecture) -> tuple[int, int, int]:
    """Rows of q, k and v per key/value head."""
    return a.num_attention_heads // a.num_key_value_heads * a.head_dim, a.head_dim, a.head_dim
