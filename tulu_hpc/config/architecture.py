"""The shape of a Llama-family model: what `config.json` of a Hugging Face directory says, as typed fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeScaling(BaseModel):
    """Llama 3 frequency scaling (`rope_type: llama3`); lengths in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class Architecture(BaseModel):
    """Dimensions of a Llama model, named as in transformers' `LlamaConfig`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(default=0, ge=0, description="0: hidden_size / num_attention_heads")
    max_position_embeddings: int = Field(default=131072, gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=500000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        return self

    def parameter_count(self) -> int:
        """Parameters of the whole model, vocabulary as given (no padding); tied embeddings count once."""
        kv_width = self.num_key_value_heads * self.head_dim
        q_width = self.num_attention_heads * self.head_dim
        attention = self.hidden_size * (2 * q_width + 2 * kv_width)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    def to_hf(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `LlamaConfig`."""
        fields = self.model_dump(exclude={"rope_theta", "rope_scaling"})
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling is not None:
            rope.update(self.rope_scaling.model_dump())
        return {**fields, "rope_parameters": rope, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}

    @classmethod
    def from_hf(cls, directory: str | Path) -> Architecture:
        """Read `config.json` of a Hugging Face directory.

        Raises:
            ValueError: naming the file and the key when the model is not a Llama that we can train exactly.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise ValueError(f"{path}: not found; model.path must be a Hugging Face model directory")
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        if raw.get("model_type") != "llama":
            raise ValueError(f"{path}: model_type {raw.get('model_type')!r} is not supported (llama only)")
        for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
            if raw.get(key, wanted) != wanted:
                raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported (only {wanted!r})")
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        if kind == "default":
            scaling = None
        elif kind == "llama3":
            try:
                scaling = RopeScaling(**{k: v for k, v in rope.items() if k in RopeScaling.model_fields})
            except ValueError as error:
                raise ValueError(f"{path}: rope_scaling: {error}") from error
        else:
            raise ValueError(f"{path}: rope_type {kind!r} is not supported (default or llama3)")
        names = set(cls.model_fields) - {"rope_theta", "rope_scaling"}
        known = {k: raw[k] for k in names if raw.get(k) is not None}
        known.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        # What transformers takes for a key that is not there, which is not what Llama 3 has.
        known = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **known}
        try:
            return cls(**known, rope_theta=theta, rope_scaling=scaling)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
