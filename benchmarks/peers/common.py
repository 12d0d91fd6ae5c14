"""What every process of a peer benchmark knows: the model, the data, and the specification of its task."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAD, END = "<pad>", "<end>"
GROUP = 8  # answers to a prompt in the GRPO comparison
UPDATES_PER_BATCH = 2  # there, of the same samples


@dataclass(frozen=True)
class ModelSize:
    """Shape of the Llama that all contestants train."""

    vocab_size: int = 8192
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2


QUICK_MODEL = ModelSize(64, 32, 64, 2, 4, 2)


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts: `median`, `sigma` of the logarithm, cut to [`low`, `high`]; sigma 0 gives one length."""

    median: float
    sigma: float
    low: int
    high: int


@dataclass(frozen=True)
class Spec:
    """Everything a worker has to know; written as JSON by the driver. Lists of rows are in training order."""

    model_dir: str
    output_dir: str
    rows_file: str
    steps: int
    global_batch: int
    threads: int
    lr: float
    pack_rows: int
    beta: float = 0.1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_model(directory: Path, size: ModelSize, seed: int) -> int:
    """Write a random Llama and a word-level tokenizer (word `t17` is token 17) in Hugging Face format.

    Returns:
        The number of parameters.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **dataclasses.asdict(size),
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    words = {PAD: 0, END: 1} | {f"t{i}": i for i in range(2, size.vocab_size)}
    core = Tokenizer(WordLevel(words, unk_token=PAD))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END).save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def random_rows(names: dict[str, Lengths], count: int, vocab_size: int, seed: int) -> list[dict[str, list[int]]]:
    """`count` rows of random token ids; every part but the prompt ends with the end token (id 1)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = {}
        for name, lengths in names.items():
            drawn = rng.lognormal(np.log(lengths.median), lengths.sigma)
            n = int(np.clip(round(drawn), lengths.low, lengths.high))
            ids = rng.integers(2, vocab_size, n).tolist()
            row[name] = ids if name == "prompt" else ids[:-1] + [1]
        rows.append(row)
    return rows


def read_rows(spec: Spec) -> list[dict[str, list[int]]]:
    """Token ids in training order, by part (`prompt`, `response` or `chosen` and `rejected`)."""
    return json.loads(Path(spec.rows_file).read_text())


def answers_of(row: dict[str, list[int]]) -> list[list[int]]:
    """The answers of a group, in order."""
    return [row[f"answer{number}"] for number in range(GROUP)]


def rewards_of(row: dict[str, list[int]]) -> list[float]:
    """Rewards of a group's answers: arbitrary, but fixed and never all the same."""
    return [1.0, 0.0] + [float(sum(answer) % 2) for answer in answers_of(row)[2:]]
