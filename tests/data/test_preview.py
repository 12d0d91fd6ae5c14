"""The preview page: what is marked is what the pack scores."""

from __future__ import annotations

import re
from html import unescape

import pytest
import torch

from tests.data.tokenizers_for_tests import byte_level
from tulu_hpc.data.chat_template import ChatTemplate
from tulu_hpc.data.datasets import preference_items, sft_items
from tulu_hpc.data.packed_batch import Item, TokenSequence
from tulu_hpc.data.preview import choose, preview_page
from tulu_hpc.data.readout import with_readout
from tulu_hpc.data.records import Message, PreferenceRecord, SftRecord

EOS = "<|end_of_text|>"


def marked(html: str) -> str:
    """Text of the marked tokens of all samples."""
    samples = html[html.index('id="samples"') :]
    body = samples[samples.index("</p>") :]
    found = re.findall(r'<span title="[^"]*" class="t">(.*?)</span>', body, flags=re.DOTALL)
    return unescape("".join(found)).replace("\u21b5\n", "\n")


def test_marked_text_is_the_assistants_own() -> None:
    tokenizer = byte_level()
    messages = [
        Message("system", "Be brief & <b>bold</b>."),
        Message("user", "Hi \U0001f642"),
        Message("assistant", "Hello \U0001f680 <i>there</i>\nline"),
        Message("user", "And?"),
        Message("assistant", "Bye"),
    ]
    items = sft_items([SftRecord(messages, "chat", "id1")], tokenizer, ChatTemplate.load("tulu", tokenizer), 512)
    html = preview_page(items, tokenizer, title="t", rows=3, seed=0, summaries=["chat.jsonl: 1 of 1 rows"])
    end = tokenizer.eos_token
    assert marked(html) == f"{messages[2].content}{end}{messages[4].content}{end}"
    assert "<b>bold</b>" not in html and "chat.jsonl: 1 of 1 rows" in html and "<!doctype html>" in html


def test_both_answers_of_a_pair_are_shown() -> None:
    tokenizer = byte_level()
    prompt = [Message("user", "Say something")]
    record = PreferenceRecord(prompt, [Message("assistant", "Good")], [Message("assistant", "Bad")], "pairs", "p1")
    items = preference_items([record], tokenizer, ChatTemplate.load("tulu", tokenizer), 512)
    html = preview_page(items, tokenizer, title="t", rows=1, seed=0)
    assert marked(html) == f"Good{tokenizer.eos_token}Bad{tokenizer.eos_token}"
    plain = unescape(re.sub("<[^>]*>", "", html[html.index('id="samples"') :]))
    assert plain.index("chosen") < plain.index("rejected") and plain.count("Say something") == 2


def test_of_a_scalar_head_the_token_is_marked_at_which_it_is_read() -> None:
    tokenizer = byte_level()
    prompt = [Message("user", "Say something")]
    record = PreferenceRecord(prompt, [Message("assistant", "Good")], [Message("assistant", "Bad")], "pairs", "p1")
    items = preference_items([record], tokenizer, ChatTemplate.load("tulu", tokenizer), 512)
    html = preview_page([with_readout(item) for item in items], tokenizer, title="t", rows=1, seed=0, readout=True)
    assert marked(html) == 2 * tokenizer.eos_token
    plain = unescape(re.sub("<[^>]*>", "", html[html.index('id="samples"') :]))
    assert plain.count(tokenizer.eos_token) == 2, "the place of the read-out is no token"
    assert "2 read out" in plain and "trained" not in plain


def test_a_wrong_mask_shows() -> None:
    """The page must differ when the mask does: it is what people look at to find the mistake."""
    tokenizer = byte_level()
    ids = torch.tensor(tokenizer("one two three four", add_special_tokens=False)["input_ids"])
    right, wrong = torch.zeros(len(ids), dtype=torch.bool), torch.ones(len(ids), dtype=torch.bool)
    right[-2:] = True
    pages = [
        preview_page([Item("sequence", [TokenSequence(ids, mask)], id="x")], tokenizer, title="t", rows=1, seed=0)
        for mask in (right, wrong)
    ]
    assert marked(pages[0]) == tokenizer.decode(ids[-2:]) and marked(pages[1]) == tokenizer.decode(ids[1:])
    share = [re.search(r"([\d.]+) %", page) for page in pages]
    assert share[0] and share[1] and float(share[0].group(1)) < float(share[1].group(1))


@pytest.mark.parametrize("rows", [0, 1, 3, 50])
def test_choice(rows: int) -> None:
    items = [
        Item("sequence", [TokenSequence(torch.arange(n))], id=str(n), source="ab"[n == 5]) for n in (7, 3, 9, 5, 4)
    ]
    found = [item.id for item in choose(items, rows, seed=1)]
    assert found == [item.id for item in choose(items, rows, seed=1)] and len(found) == min(rows, 5)
    assert found[:2] == ["9", "3"][:rows] and len(set(found)) == len(found)
    assert rows < 4 or "5" in found[:4]
