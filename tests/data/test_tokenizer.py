from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.tokenizers_for_tests import TEXTS, byte_level
from tulu_hpc.data.tokenizer import load_tokenizer, train_tokenizer


def test_every_digit_is_a_token_and_every_text_survives() -> None:
    tokenizer = byte_level()
    assert [tokenizer.decode([i]) for i in tokenizer("1234567")["input_ids"]] == list("1234567")
    for text in (*TEXTS, "höö 😀\tx\r\n  y", "it's 12'000"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("<|user|><|assistant|><|end_of_text|>")["input_ids"]) == 3


def test_training_is_repeatable_and_survives_saving(tmp_path: Path) -> None:
    first, again = train_tokenizer(TEXTS, 400), train_tokenizer(TEXTS, 400)
    assert first.get_vocab() == again.get_vocab() and len(first) <= 400
    first.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "<|user|>\nTom has 12 apples.\n<|assistant|>\n12+5=17<|end_of_text|>"
    assert loaded(text)["input_ids"] == first(text)["input_ids"]
    assert (loaded.eos_token, loaded.pad_token) == ("<|end_of_text|>", "<|pad|>")
    assert loaded.chat_template == first.chat_template
    assert sorted(loaded.all_special_tokens) == sorted(first.all_special_tokens)


def test_truncation_saved_with_a_tokenizer_is_switched_off(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.save_pretrained(tmp_path)
    assert '"max_length": 3' in (tmp_path / "tokenizer.json").read_text()
    assert len(load_tokenizer(tmp_path).backend_tokenizer.encode("1234567").ids) == 7


def test_bad_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size 256"):
        train_tokenizer(TEXTS, 256)


def test_ids_beyond_the_model_are_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path, rows + 1)) == rows + 1
    with pytest.raises(ValueError, match=rf"1 ids beyond the model's vocab_size of {rows} \('<\|new\|>' = {rows}\)"):
        load_tokenizer(tmp_path, rows)
