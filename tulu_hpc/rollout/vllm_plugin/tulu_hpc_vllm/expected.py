"""What a full set of weights is: names and shapes of a Llama-like model, from its Hugging Face config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MODEL_TYPES = ("llama",)


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter under its Hugging Face name.

    Raises:
        ValueError: a kind of model whose names are not known here.
    """
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"weight updates know the models {', '.join(MODEL_TYPES)}, not {config.model_type}")
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config.num_hidden_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def check_announced(
    expected: Mapping[str, tuple[int, ...]], names: Sequence[str], shapes: Sequence[Sequence[int]], received: set[str]
) -> None:
    """Refuse tensors before anything is sent.

    Raises:
        ValueError: an unknown or repeated name, or another shape than the served model's.
    """
    for name, shape in zip(names, shapes, strict=True):
        if name not in expected:
            raise ValueError(f"the served model has no parameter {name}")
        if tuple(shape) != expected[name]:
            raise ValueError(f"{name} has shape {list(shape)}, the served model wants {list(expected[name])}")
        if name in received:
            raise ValueError(f"{name} was sent twice in one update")


def check_complete(expected: Iterable[str], received: set[str]) -> None:
    """Refuse to finish an update that leaves old weights in place.

    Raises:
        ValueError: parameters were never sent.
    """
    missing = sorted(set(expected) - received)
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{len(missing)} parameters were never sent: {some}")
