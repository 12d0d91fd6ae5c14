"""A tokenizer learned from records and a random Llama, as one Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tulu_hpc.config.schema import InitialiseConfig
from tulu_hpc.data.records import LabelledRecord, PreferenceRecord, RecordKind, read_records
from tulu_hpc.data.tokenizer import train_tokenizer
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.safetensors_files import published
from tulu_hpc.stages.step_files import check_files


def run(config: InitialiseConfig) -> Path:
    """Write `initialise.output`; return its path. The directory appears, or replaces an older one, only when complete.

    The vocabulary of the architecture is that of the tokenizer, which may need fewer than `tokenizer.vocab_size` rows.

    Raises:
        ConfigError: `initialise.output` holds something that is no model of ours.
        RecordError: a malformed row of `tokenizer.texts`.
        ValueError: the vocabulary is too small for bytes and special tokens.
    """
    check_files(config)
    tokenizer = train_tokenizer(
        _texts(config.tokenizer.texts, config.tokenizer.kind),
        config.tokenizer.vocab_size,
        max_length=config.architecture.max_position_embeddings,
    )
    architecture = config.architecture.model_copy(update={"vocab_size": len(tokenizer)})
    section = config.initialise
    output = Path(section.output)
    with published(output) as staging:
        random_hf_model(
            architecture,
            staging,
            seed=config.run.seed,
            embedding_std=section.embedding_std,
            linear_std=section.linear_std,
            scale_residual_outputs=section.scale_residual_outputs,
        )
        tokenizer.save_pretrained(staging)
        _set_special_tokens(staging, tokenizer)
    print(f"tokenizer: {len(tokenizer)} tokens from {', '.join(config.tokenizer.texts)}")
    print(f"model: {architecture.parameter_count():,} parameters: {output}")
    return output


def _texts(paths: list[str], kind: RecordKind) -> Iterator[str]:
    for path in paths:
        for record in read_records(path, kind):
            if isinstance(record, PreferenceRecord):
                messages = record.prompt + record.chosen + record.rejected
            elif isinstance(record, LabelledRecord):
                messages = record.prompt + record.completion
            else:
                messages = record.messages
            for message in messages:
                yield message.content


def _set_special_tokens(directory: Path, tokenizer: Any) -> None:
    """Tell transformers where generation ends: without this it would take token 2 for the end of text."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **ids}, indent=2, sort_keys=True) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
