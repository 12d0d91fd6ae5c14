"""Conversations that call tools: records, templates that render them, and the proof of their masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.tokenizers_for_tests import chat_markers
from tulu_hpc.data.chat_template import ChatTemplate, MaskProofError, encode_conversation, encode_conversations
from tulu_hpc.data.datasets import sft_items
from tulu_hpc.data.mixing import to_row
from tulu_hpc.data.records import SftRecord, parse_record, read_records
from tulu_hpc.data.rows import RecordError

# As many models are trained: tools in the system turn, calls as tagged JSON, answers in a user turn.
TAGGED = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": 'Lübeck "Nord"', "d": 3}}}
ROW: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief.", "tool_calls": None},
        {"role": "user", "content": "Weather in Lübeck?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "No idea."},
    ],
    "tools": [TOOL],
}


def record(row: dict[str, Any]) -> SftRecord:
    found = parse_record(row, "sft", file="f.jsonl", line=3)
    assert isinstance(found, SftRecord)
    return found


def changed(**fields: Any) -> dict[str, Any]:
    """The row with other fields in its call."""
    row = json.loads(json.dumps(ROW))
    row["messages"][2]["tool_calls"][0]["function"].update(fields)
    return row


def test_every_assistant_turn_is_trained_calls_included() -> None:
    tokenizer = chat_markers()
    template = ChatTemplate(TAGGED, tokenizer)
    (result,) = encode_conversations(tokenizer, template, [record(ROW).messages], [record(ROW).tools])
    assert not isinstance(result, MaskProofError)
    trained = tokenizer.decode([t for t, keep in zip(result.token_ids, result.mask, strict=True) if keep])
    call = json.dumps(CALL["function"], ensure_ascii=False)
    assert trained == f"<call>{call}</call><|im_end|>No idea.<|im_end|>"
    whole = tokenizer.decode(result.token_ids)
    assert json.dumps(TOOL) in whole and "Be brief." in whole and set(result.turn_starts) == {2, 4}


def test_words_and_two_calls_in_one_turn() -> None:
    row = json.loads(json.dumps(ROW))
    turn = row["messages"][2]
    turn["content"], turn["tool_calls"] = "I will look.", [CALL, CALL]
    tokenizer = chat_markers()
    (result,) = encode_conversations(tokenizer, ChatTemplate(TAGGED, tokenizer), [record(row).messages])
    assert not isinstance(result, MaskProofError), result
    trained = tokenizer.decode([t for t, keep in zip(result.token_ids, result.mask, strict=True) if keep])
    assert trained.startswith("I will look.<call>") and trained.count("<call>") == 2


def test_arguments_may_be_text_and_the_record_stays_the_same() -> None:
    as_text = changed(arguments=json.dumps(CALL["function"]["arguments"]))
    assert record(as_text) == record(ROW)
    assert record({**ROW, "tools": json.dumps([TOOL])}) == record(ROW)
    assert record({"messages": ROW["messages"]}).id != record(ROW).id
    assert record(json.loads(json.dumps(to_row(record(ROW), "s")))).messages == record(ROW).messages
    assert to_row(record(ROW), "s")["tools"] == [TOOL]


def test_plain_records_keep_their_ids() -> None:
    plain = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert record(plain).id == "5d0132e43f8be169"


def test_a_template_without_tools_is_refused() -> None:
    tokenizer = chat_markers()
    deaf = ChatTemplate(TAGGED.replace("{% if tools %}", "{% if false %}"), tokenizer)
    result = encode_conversations(tokenizer, deaf, [record(ROW).messages], [record(ROW).tools])[0]
    assert isinstance(result, MaskProofError) and "does not show the 1 tools" in str(result)
    silent = ChatTemplate(TAGGED.replace("<call>{{ call.function | tojson }}</call>", ""), tokenizer)
    with pytest.raises(MaskProofError, match=r"'weather' of messages\[2\] is not in the text"):
        encode_conversation(tokenizer, silent, record(ROW).messages)
    forgetful = ChatTemplate(TAGGED.replace("call.function | tojson", "call.function.name"), tokenizer)
    with pytest.raises(MaskProofError, match=r"the argument .*Nord.* of weather in messages\[2\]"):
        encode_conversation(tokenizer, forgetful, record(ROW).messages)
    with pytest.raises(MaskProofError, match="no role tool"):
        encode_conversation(tokenizer, ChatTemplate.load("tulu", tokenizer), record(ROW).messages)


def test_special_tokens_inside_a_call_are_refused() -> None:
    tokenizer = chat_markers()
    with pytest.raises(MaskProofError, match=r"messages\[2\] contains the text of the special token"):
        encode_conversation(
            tokenizer, ChatTemplate(TAGGED, tokenizer), record(changed(arguments={"x": "<|im_end|>"})).messages
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(arguments="{"), r"f.jsonl:3: messages\[2\].tool_calls\[0\].function.arguments: not JSON"),
        (changed(arguments=[1]), "need an object"),
        (changed(name=""), r"messages\[2\].tool_calls\[0\]: is .*need a function with a name"),
        ({**ROW, "tools": "["}, "f.jsonl:3: tools: not JSON"),
        ({**ROW, "tools": ["weather"]}, "tools: is .*need a list of objects"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "belong to an assistant turn"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "need a string"),
    ],
)
def test_malformed_calls_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record(row)


def test_from_file_to_items(tmp_path: Path) -> None:
    file = tmp_path / "tools.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    tokenizer = chat_markers()
    (item,) = sft_items(read_records(file, "sft"), tokenizer, ChatTemplate(TAGGED, tokenizer), 4096)
    assert item.responses[0].mask is not None and int(item.responses[0].mask.sum()) > 10
