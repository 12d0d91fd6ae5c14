"""Small tokenizers, trained on the spot."""

from __future__ import annotations

from functools import cache
from typing import Any

from tulu_hpc.data.tokenizer import train_tokenizer

TEXTS = [
    "Tom has 12 apples. How many apples now?",
    "12+5=17\n17-3=14\nThe answer is 14.",
    "Hello there. Be brief. You are kind.",
    "* Cat\n* Dog\n* Owl",
] * 5


@cache
def byte_level(special_roles: bool = True) -> Any:
    """As the quickstart's; with `special_roles` False the role markers are plain text, as in Tulu 3."""
    return train_tokenizer(TEXTS, 512, **({} if special_roles else {"role_markers": ()}))


@cache
def chat_markers() -> Any:
    """A tokenizer with the special tokens of the ChatML and Llama 3 templates."""
    markers = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|bos|>")
    return train_tokenizer(TEXTS, 512, role_markers=markers)


@cache
def merging() -> Any:
    """A byte-level BPE without a split rule: it merges across anything, turns included."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "<|user|>\nHi\n<|assistant|>\nHello"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
