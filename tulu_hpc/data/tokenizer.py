"""Loading, training and saving tokenizers in Hugging Face format. transformers is imported when it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tulu_hpc.data.chat_template import TULU

PAD, END_OF_TEXT = "<|pad|>", "<|end_of_text|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
# Llama 3's split rule with its \p{N}{1,3} narrowed to one digit, so that numbers are spelled digit by digit.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Any:
    """The fast tokenizer of a local Hugging Face directory (a transformers `PreTrainedTokenizerFast`).

    Truncation and padding saved with it are switched off: what is cut, we cut and count.

    Args:
        vocab_size: rows of the model's embedding; a tokenizer that has ids beyond them is refused, because a
            vocabulary-parallel embedding would read zeros for such a token without a word.

    Raises:
        ValueError: the directory has no tokenizer that can be used, saying why.
    """
    directory = Path(path)
    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer_config.json").is_file():
        raise ValueError(f"{directory}: no tokenizer here (tokenizer.json); model.path must hold one")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, KeyError, ImportError, TypeError) as error:
        raise ValueError(f"{directory}: the tokenizer cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{directory}: need a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    if vocab_size is not None:
        beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
        if beyond:
            named = ", ".join(f"{token!r} = {index}" for index, token in beyond[:3])
            raise ValueError(
                f"{directory}: the tokenizer has {len(beyond)} ids beyond the model's vocab_size of {vocab_size} "
                f"({named}): enlarge the embedding (transformers' resize_token_embeddings) or drop those tokens"
            )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """The token that pads packs; which one does not matter, as its rows are not read."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad_id or 0)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    role_markers: Sequence[str] = ROLE_MARKERS,
    min_frequency: int = 2,
    max_length: int = 2048,
) -> Any:
    """Train a byte-level BPE tokenizer with the Tulu chat template.

    Every digit is a token. The role markers of the template, plain text in Tulu 3, become special tokens: a small
    vocabulary has better uses for its merges.

    Args:
        texts: what to learn from, without template text.
        vocab_size: an upper bound; learning stops when no pair occurs `min_frequency` times.
        max_length: saved as the tokenizer's `model_max_length`.

    Returns:
        A transformers `PreTrainedTokenizerFast`.

    Raises:
        ValueError: the vocabulary cannot even hold the 256 bytes and the special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END_OF_TEXT, *role_markers]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size {vocab_size} cannot hold 256 bytes and {len(special)} special tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(role_markers),
        chat_template=TULU,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
