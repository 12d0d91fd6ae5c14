"""Between token ids and text at the two ends of a rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tulu_hpc.rollout.engine import Completion


def stop_token_ids(tokenizer: Any, model_path: str | Path) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end-of-text and those of `generation_config.json`, if there is one.

    Raises:
        ValueError: there is none at all; every answer would run to the token limit.
    """
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    file = Path(model_path) / "generation_config.json"
    if file.is_file():
        given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found += given if isinstance(given, list) else [given] if given is not None else []
    if not found:
        raise ValueError(f"{model_path}: neither the tokenizer nor generation_config.json has an end-of-text token")
    return tuple(dict.fromkeys(found))


def ended_itself(completion: Completion) -> bool:
    """Whether the model ended the answer with an end-of-text token (and neither a limit nor a stop string did)."""
    return completion.finish_reason == "stop" and isinstance(completion.stop_reason, int)


def completion_text(tokenizer: Any, completion: Completion) -> str:
    """Text of an answer: without special tokens, and cut before the stop string that ended it."""
    text = str(tokenizer.decode(completion.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if isinstance(completion.stop_reason, str):
        text = text.split(completion.stop_reason, 1)[0]
    return text
