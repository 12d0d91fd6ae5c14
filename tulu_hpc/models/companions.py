"""What belongs to a model directory beside the weights: configuration, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.scalar_head import Head

_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def write_config(
    directory: Path,
    architecture: Architecture,
    dtype: torch.dtype,
    source: Path | None = None,
    head: Head = "logprobs",
) -> None:
    """Write `config.json`; special token ids are taken over from the source's where it has them."""
    config: dict[str, Any] = {}
    original = source / "config.json" if source is not None else None
    if original is not None and original.is_file():
        raw = json.loads(original.read_text())
        config = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    config.update(architecture.to_hf())
    config.update(
        architectures=["LlamaForCausalLM"], model_type="llama", dtype=str(dtype).removeprefix("torch."), use_cache=True
    )
    if head == "value":
        config.update(
            architectures=["LlamaForSequenceClassification"], id2label={"0": "reward"}, label2id={"reward": 0}
        )
        if config.get("pad_token_id") in _ids(config.get("eos_token_id")):
            # transformers reads the score at the last token that is not padding: it would pass over the end-of-text.
            del config["pad_token_id"]
    config["torch_dtype"] = config["dtype"]  # the name of the key before transformers 5
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer files, chat template and generation settings; what the source lacks is not missed."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
