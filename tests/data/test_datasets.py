"""From records to items: what is kept, cut and dropped, and that every count is reported."""

from __future__ import annotations

import pytest
import torch

from tests.data.tokenizers_for_tests import byte_level, merging
from tulu_hpc.data.chat_template import ChatTemplate, MaskProofError, encode_conversation, encode_prompt
from tulu_hpc.data.datasets import preference_items, rlvr_prompts, sft_items
from tulu_hpc.data.packed_batch import pack
from tulu_hpc.data.records import Message, PreferenceRecord, RlvrRecord, SftRecord

USER = Message("user", "Tom has 12 apples. How many apples now?")
GOOD, BAD = Message("assistant", "12+5=17\nThe answer is 17."), Message("assistant", "The answer is 3.")


def template() -> ChatTemplate:
    return ChatTemplate.load("tulu", byte_level())


def sft(*messages: Message, name: str = "a") -> SftRecord:
    return SftRecord(list(messages), "test", name)


def test_sft_items_hold_the_tokens_and_the_mask() -> None:
    follow_up = Message("user", "Hello there.")
    items = sft_items([sft(USER, GOOD), sft(USER, GOOD, follow_up)], byte_level(), template(), 4096)
    token_ids, mask = encode_conversation(byte_level(), template(), [USER, GOOD])
    for item in items:
        assert item.responses[0].tokens.tolist() == token_ids, "what follows the last answer is left out"
        assert item.responses[0].mask is not None and item.responses[0].mask.tolist() == mask
        assert (item.id, item.source, item.kind) == ("a", "test", "sequence")
    assert pack(items[:1]).num_targets == sum(mask)
    assert items.summary() == "2 of 2 rows"


def test_sft_keeps_the_first_tokens_and_drops_rows_without_a_trained_one() -> None:
    token_ids, mask = encode_conversation(byte_level(), template(), [USER, GOOD])
    start = mask.index(True)
    for limit in (len(token_ids), len(token_ids) - 1, start + 1):
        (item,) = sft_items([sft(USER, GOOD)], byte_level(), template(), limit)
        assert item.responses[0].tokens.tolist() == token_ids[:limit]
    items = sft_items([sft(USER, GOOD)] * 3 + [sft(Message("user", "Hi"), BAD)], byte_level(), template(), start)
    assert items.counts == {"rows": 4, "kept": 1, "cut": 3, "without a trained token": 3}
    assert items.summary() == "1 of 4 rows (3 cut, 3 without a trained token)"


def test_rows_whose_mask_cannot_be_proven() -> None:
    rows = [sft(USER, GOOD), sft(GOOD, name="broken"), sft(USER, BAD)]
    with pytest.raises(MaskProofError, match="record broken of test: tulu"):
        sft_items(rows, byte_level(), template(), 99)
    items = sft_items(rows, byte_level(), template(), 99, on_error="skip")
    assert (len(items), items.counts["unproven mask"]) == (2, 1)
    with pytest.raises(MaskProofError, match="merges text"):
        sft_items(
            [sft(Message("user", "Hi"), Message("assistant", "Hello"))],
            merging(),
            ChatTemplate.load("tulu", merging()),
            99,
        )


def test_many_rows_keep_their_order() -> None:
    rows = [sft(USER, Message("assistant", f"The answer is {i}."), name=str(i)) for i in range(2100)]
    items = sft_items(rows, byte_level(), template(), 99)
    assert [item.id for item in items] == [str(i) for i in range(2100)]
    assert byte_level().decode(items[2057].responses[0].tokens).endswith("The answer is 2057.<|end_of_text|>")


def pair(chosen: list[Message], rejected: list[Message], prompt: list[Message] | None = None) -> PreferenceRecord:
    return PreferenceRecord(prompt or [USER], chosen, rejected, "test", "p")


def test_pairs_hold_the_prompt_once() -> None:
    (item,) = preference_items([pair([GOOD], [BAD])], byte_level(), template(), 4096)
    prompt = encode_prompt(byte_level(), template(), [USER])
    assert item.prompt.tolist() == prompt
    for response, answer in zip(item.responses, (GOOD, BAD), strict=True):
        whole, mask = encode_conversation(byte_level(), template(), [USER, answer])
        assert [*prompt, *response.tokens.tolist()] == whole
        assert response.mask is not None and response.mask.tolist() == mask[len(prompt) :]
    batch = pack([item])
    assert batch.num_rows <= len(prompt) + sum(len(r) for r in item.responses)
    assert batch.num_targets == sum(len(r) for r in item.responses)


def test_answers_of_several_turns_train_the_assistant_only() -> None:
    prompt = [USER, BAD, Message("user", "Be brief.")]
    longer = [GOOD, Message("user", "You are kind."), BAD]
    (item,) = preference_items([pair(longer, [BAD], prompt)], byte_level(), template(), 4096)
    mask = item.responses[0].mask
    assert mask is not None and not mask.all() and mask[0] and mask[-1]
    trained = byte_level().decode(item.responses[0].tokens[mask])
    assert trained == "12+5=17\nThe answer is 17.<|end_of_text|>The answer is 3.<|end_of_text|>"
    assert item.prompt.tolist() == encode_prompt(byte_level(), template(), prompt)


def test_pairs_are_cut_and_dropped_with_a_count() -> None:
    start = len(encode_prompt(byte_level(), template(), [USER]))
    same_start = pair([Message("assistant", "The answer is 3. Hello")], [BAD])
    (item,) = preference_items([same_start], byte_level(), template(), start + 7)
    assert all(len(response) <= 7 for response in item.responses)
    assert not preference_items([same_start], byte_level(), template(), start)
    counts = preference_items([same_start, pair([GOOD], [BAD])], byte_level(), template(), start + 2).counts
    assert counts == {"rows": 2, "kept": 1, "cut": 2, "with equal answers after the cut": 1}
    counts = preference_items([same_start], byte_level(), template(), start).counts
    assert counts["without room for both answers"] == 1


def test_prompts_are_never_cut() -> None:
    records = [RlvrRecord([USER], ["17"], ["gsm8k"], "test", "r"), RlvrRecord([GOOD], ["17"], ["gsm8k"], "test", "bad")]
    prompts = rlvr_prompts(records[:1], byte_level(), template(), 99)
    assert prompts[0].token_ids == encode_prompt(byte_level(), template(), [USER])
    assert prompts[0].record is records[0]
    short = rlvr_prompts(records, byte_level(), template(), 5, on_error="skip")
    assert short.counts == {"rows": 2, "kept": 0, "cut": 0, "longer than data.max_length": 1, "unproven mask": 1}
    with pytest.raises(MaskProofError, match="record bad of test"):
        rlvr_prompts(records, byte_level(), template(), 99)


def test_token_tensors_are_int64() -> None:
    (item,) = sft_items([sft(USER, GOOD)], byte_level(), template(), 99)
    assert item.responses[0].tokens.dtype == torch.int64
