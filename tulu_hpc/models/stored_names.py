"""The tensors of a megatron checkpoint (torch_dist), and which rows of which Hugging Face tensors they consist of.

A checkpoint knows nothing of parallel layouts: every parameter is one global tensor, layers are stacked along a first
axis, and the vocabulary may carry rows of padding at its end. In rows each is a rearrangement of Hugging Face tensors:

    self_attention.linear_qkv   per key/value head: its rows of q, its rows of k, its rows of v
    mlp.linear_fc1              gate, then up
    all others                  the Hugging Face tensor as it is

Norms are stored under the names of the fused layers of Transformer Engine, whichever layer spec trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.names import LAYER_PARAMETERS, SCORE, Mapping, hf_shapes, mapping, qkv_widths
from tulu_hpc.models.scalar_head import Head

_STORED_AS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Modules for which megatron stores an (empty) state object per layer beside the weights, and misses it on loading.
EXTRA_STATES = tuple(
    f"decoder.layers.{module}._extra_state"
    for module in ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
)


@dataclass(frozen=True)
class Rows:
    """`count` rows of a Hugging Face tensor, from row `start`."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Parameter:
    """One parameter of one layer as a checkpoint holds it.

    Attributes:
        key: of the checkpoint's tensor.
        layer: index along that tensor's first axis; None: it has no layer axis.
        shape: of the parameter, without layer axis and padding.
        parts: what it consists of, from its first row to its last.
        split_columns: tensor-parallel ranks hold columns, not rows.
        padded: a checkpoint may hold more rows, of padding.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    parts: tuple[Rows, ...]
    split_columns: bool
    padded: bool

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.name for part in self.parts))


def stored_parameters(architecture: Architecture, head: Head = "logprobs") -> Iterator[Parameter]:
    """Every parameter of the model, in the order it runs; tied embeddings once."""
    shapes = hf_shapes(architecture, head)
    yield _parameter("embedding.word_embeddings.weight", None, architecture, shapes)
    for layer in range(architecture.num_hidden_layers):
        for name in LAYER_PARAMETERS:
            yield _parameter(name, layer, architecture, shapes)
    yield _parameter("decoder.final_layernorm.weight", None, architecture, shapes)
    if head == "value":
        yield _parameter(SCORE, None, architecture, shapes)
    elif not architecture.tie_word_embeddings:
        yield _parameter("output_layer.weight", None, architecture, shapes)


def _parameter(
    name: str, layer: int | None, architecture: Architecture, shapes: dict[str, tuple[int, ...]]
) -> Parameter:
    mapped = mapping(name if layer is None else f"decoder.layers.{layer}.{name}", 0, architecture)
    parts = _parts(mapped, architecture, shapes)
    return Parameter(
        key=name if layer is None else f"decoder.layers.{_STORED_AS.get(name, name)}",
        layer=layer,
        shape=(sum(part.count for part in parts), *shapes[mapped.hf_names[0]][1:]),
        parts=parts,
        split_columns=mapped.kind == "columns",
        padded=mapped.kind == "vocab",
    )


def _parts(mapped: Mapping, architecture: Architecture, shapes: dict[str, tuple[int, ...]]) -> tuple[Rows, ...]:
    if mapped.kind != "qkv":
        return tuple(Rows(name, 0, shapes[name][0]) for name in mapped.hf_names)
    widths = qkv_widths(architecture)
    return tuple(
        Rows(name, head * width, width)
        for head in range(architecture.num_key_value_heads)
        for name, width in zip(mapped.hf_names, widths, strict=True)
    )
