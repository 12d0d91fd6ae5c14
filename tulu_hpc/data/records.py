"""Record schemas, and records from the rows of a file or data set (`rows`).

| kind | fields |
|---|---|
| sft | `messages` |
| preference | `chosen`, `rejected` (messages or a string), optionally `prompt` (messages or a string) |
| rlvr | `messages`, `ground_truth` (one or a list), `dataset` (one or a list: which verifier checks it) |

All kinds may carry `source` (or, but for rlvr, `dataset`; else the file's name stands for it), and `tools`: what the
chat template is told of the functions that may be called. Other fields are ignored by the readers. No torch is imported
here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from tulu_hpc.data.rows import NOT_TEXT, RecordError, is_text, iterate_rows, json_text, show

RecordKind = Literal["sft", "preference", "rlvr"]
ROLES = ("system", "user", "assistant", "tool")
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions, in the form that the chat template expects


class _FieldError(ValueError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `message["role"]` works too, as chat templates expect.

    Attributes:
        role: one of ROLES.
        content: may be empty for a tool's answer and for an assistant turn that calls tools.
        extra: what else chat templates read, as plain JSON: `tool_calls` of an assistant turn (arguments as an object),
            `tool_call_id` and `name` of a tool's answer.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    @property
    def tool_calls(self) -> list[Mapping[str, Any]]:
        """`{"name": ..., "arguments": {...}}` of each call."""
        return [call["function"] for call in self.extra.get("tool_calls", [])]

    def to_dict(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class SftRecord:
    """A conversation whose assistant turns are trained. `id` is a hash of the content."""

    messages: list[Message]
    source: str
    id: str
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """Two continuations of one prompt; `prompt` holds the messages that both conversations begin with."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    source: str
    id: str
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class RlvrRecord:
    """A prompt with what its verifiers need; `ground_truth[i]` belongs to `dataset[i]`."""

    messages: list[Message]
    ground_truth: list[Any]
    dataset: list[str]
    source: str
    id: str
    tools: Tools = ()


AnyRecord = SftRecord | PreferenceRecord | RlvrRecord
R = TypeVar("R", SftRecord, PreferenceRecord, RlvrRecord)


@dataclass
class RecordSet(Generic[R]):
    """The records of a file in order, and the reason for each row left out (only with `on_error="skip"`)."""

    records: list[R]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[R]:
        return iter(self.records)

    def __getitem__(self, index: int) -> R:
        return self.records[index]


@overload
def read_records(
    path: str | Path, kind: Literal["sft"], *, on_error: Literal["raise", "skip"] = "raise"
) -> RecordSet[SftRecord]: ...
@overload
def read_records(
    path: str | Path, kind: Literal["preference"], *, on_error: Literal["raise", "skip"] = "raise"
) -> RecordSet[PreferenceRecord]: ...
@overload
def read_records(
    path: str | Path,
    kind: Literal["rlvr"],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    check: Callable[[RlvrRecord], None] | None = None,
) -> RecordSet[RlvrRecord]: ...
def read_records(
    path: str | Path,
    kind: RecordKind,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    check: Callable[[Any], None] | None = None,
) -> Any:
    """Read and check every row of `path`.

    Args:
        path: a file, a directory of files, or a Hugging Face data set id (`owner/name`, or `owner/name:split`).
        kind: the schema.
        on_error: "raise" stops at the first malformed row; "skip" leaves it out and keeps the reason.
        check: of each rlvr record, whether its ground truth can be used; a ValueError makes the row malformed.

    Raises:
        RecordError: naming file, line and field.
        FileNotFoundError: nothing is there.
        ValueError: an unknown file type, or a file without a single usable row.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, need 'raise' or 'skip'")
    records: list[Any] = []
    skipped: list[str] = []
    for file, line, row in iterate_rows(path):
        try:
            if isinstance(row, RecordError):
                raise row
            record = parse_record(row, kind, file=file, line=line)
            if check is not None:
                _require_usable(record, check, file, line)
            records.append(record)
        except RecordError as error:
            if on_error == "raise":
                raise
            skipped.append(str(error))
    if not records:
        reason = f"; first problem: {skipped[0]}" if skipped else ", it is empty"
        raise ValueError(f"{path}: no {kind} record{reason}")
    return RecordSet(records, skipped)


def _require_usable(record: Any, check: Callable[[Any], None], file: str, line: int) -> None:
    try:
        check(record)
    except ValueError as error:
        raise RecordError(str(error), file=file, line=line, field="ground_truth") from None


def parse_record(row: Mapping[str, Any], kind: RecordKind, *, file: str, line: int) -> AnyRecord:
    """One record from one row of a file.

    Raises:
        RecordError: naming the field that does not fit the schema.
    """
    parsers: dict[RecordKind, Callable[[Mapping[str, Any], str, Tools], AnyRecord]]
    parsers = {"sft": _sft, "preference": _preference, "rlvr": _rlvr}
    source = row.get("source")
    if source is None and kind != "rlvr" and isinstance(row.get("dataset"), str):
        source = row["dataset"]  # as mixes of the hub say it; of an rlvr record it names the verifier
    try:
        if source is not None and not isinstance(source, str):
            raise _FieldError("source", f"is {show(source)}, need a string")
        if source is not None and not is_text(source):
            raise _FieldError("source", NOT_TEXT)
        return parsers[kind](row, source or _stem(file), _tools(row))
    except _FieldError as error:
        raise RecordError(str(error), file=file, line=line, field=error.field) from None


def content_id(*parts: Any) -> str:
    """Stable id of a record: the first 64 bits of SHA-256 over its content as canonical JSON, in hex."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=Message.to_dict)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _sft(row: Mapping[str, Any], source: str, tools: Tools) -> SftRecord:
    messages = _messages(row, "messages")
    if not any(message.role == "assistant" for message in messages):
        raise _FieldError("messages", "has no assistant turn, there is nothing to train")
    return SftRecord(messages, source, content_id(messages, *tools), tools)


def _preference(row: Mapping[str, Any], source: str, tools: Tools) -> PreferenceRecord:
    sides = {}
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), str):
            sides[name] = [Message("assistant", row[name])]
        else:
            sides[name] = _messages(row, name)
    lead: list[Message] = []
    if row.get("prompt") is not None:
        lead = [Message("user", row["prompt"])] if isinstance(row["prompt"], str) else _messages(row, "prompt")
    chosen, rejected = (_whole(lead, name, side) for name, side in sides.items())
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if chosen == rejected:
        raise _FieldError("rejected", "is equal to chosen")
    if common == 0:
        raise _FieldError("prompt", "is missing: chosen and rejected have no leading message in common")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[common].role != "assistant":
            raise _FieldError(
                f"{name}[{common}]", f"role is {side[common].role!r}; the first message that differs must be an answer"
            )
    prompt = chosen[:common]
    answers = chosen[common:], rejected[common:]
    return PreferenceRecord(prompt, *answers, source, content_id(prompt, *answers, *tools), tools)


def _whole(lead: list[Message], name: str, side: list[Message]) -> list[Message]:
    """The conversation of one side: public data sets repeat the prompt inside both, ours do not; accept either."""
    if side[: len(lead)] == lead:
        return side
    if side[0].role == "assistant" or lead[-1].role != "user":
        return lead + side
    if all(message in side for message in lead):  # `prompt` is its last question, or leaves out the system turn
        return side
    raise _FieldError("prompt", f"is not in {name}, which begins with a {side[0].role} turn of its own")


def _rlvr(row: Mapping[str, Any], source: str, tools: Tools) -> RlvrRecord:
    messages = _messages(row, "messages")
    if messages[-1].role == "assistant":
        raise _FieldError(f"messages[{len(messages) - 1}]", "the prompt ends with an assistant turn, nothing to answer")
    for name in ("ground_truth", "dataset"):
        if row.get(name) is None:
            raise _FieldError(name, "is missing")
    ground_truth = row["ground_truth"] if isinstance(row["ground_truth"], list) else [row["ground_truth"]]
    dataset = row["dataset"] if isinstance(row["dataset"], list) else [row["dataset"]]
    if not dataset or not all(isinstance(name, str) and name for name in dataset):
        raise _FieldError("dataset", f"is {show(row['dataset'])}, need a name or a list of names")
    if len(dataset) != len(ground_truth):
        raise _FieldError("ground_truth", f"has {len(ground_truth)} entries for {len(dataset)} names in dataset")
    for name, value in (("ground_truth", ground_truth), ("dataset", dataset)):
        try:
            json_text(value)
        except ValueError as error:
            raise _FieldError(name, str(error)) from None
    return RlvrRecord(
        messages, ground_truth, dataset, source, content_id(messages, ground_truth, dataset, *tools), tools
    )


def _messages(row: Mapping[str, Any], name: str) -> list[Message]:
    value = row.get(name)
    if value is None:
        near = ", ".join(sorted(str(key) for key in row)) or "none"
        raise _FieldError(name, f"is missing (fields of the row: {near})")
    if not isinstance(value, list) or not value:
        raise _FieldError(name, f"is {show(value)}, need a list of at least one message")
    messages = []
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, Mapping):
            raise _FieldError(where, f"is {show(message)}, need an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _FieldError(f"{where}.role", f"is {show(role)}, need one of {', '.join(ROLES)}")
        extra = _extra(message, role, where)
        if content is None and "tool_calls" in extra:
            content = ""
        if not isinstance(content, str):
            raise _FieldError(f"{where}.content", f"is {show(content)}, need a string")
        if not is_text(content):
            raise _FieldError(f"{where}.content", NOT_TEXT)
        if not content.strip() and role != "tool" and "tool_calls" not in extra:
            raise _FieldError(f"{where}.content", "is empty")
        messages.append(Message(role, content, extra))
    return messages


def _extra(message: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """The parts of a message that only tools need; absent and null are the same, as tables have a column for all."""
    extra: dict[str, Any] = {}
    if calls := message.get("tool_calls"):
        if role != "assistant":
            raise _FieldError(f"{where}.tool_calls", f"belong to an assistant turn, not to {role!r}")
        if not isinstance(calls, list):
            raise _FieldError(f"{where}.tool_calls", f"is {show(calls)}, need a list")
        extra["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for name in ("tool_call_id", "name"):
        value = message.get(name)
        if role == "tool" and value:
            if not isinstance(value, str) or not is_text(value):
                raise _FieldError(f"{where}.{name}", f"is {show(value)}, need a string")
            extra[name] = value
    return extra


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """`{"id", "type": "function", "function": {"name", "arguments"}}`; arguments may come as the text of an object,
    which is how tables hold objects of different keys."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _FieldError(where, f"is {show(call)}, need a function with a name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise _FieldError(f"{where}.function.arguments", f"not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise _FieldError(f"{where}.function.arguments", f"is {show(arguments)}, need an object")
    try:
        json_text(arguments)
    except ValueError as error:
        raise _FieldError(f"{where}.function.arguments", str(error)) from None
    assert isinstance(call, Mapping)
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _tools(row: Mapping[str, Any]) -> Tools:
    """The functions a conversation may call: a list of objects, or its text."""
    value = row.get("tools")
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _FieldError("tools", f"not JSON: {error}") from None
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise _FieldError("tools", f"is {show(value)}, need a list of objects")
    try:
        json_text(value)
    except ValueError as error:
        raise _FieldError("tools", str(error)) from None
    return tuple(value)


def message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain JSON objects."""
    return [message.to_dict() for message in messages]


def _stem(file: str) -> str:
    return re.sub(r"\.(jsonl|jsonl\.gz|parquet)$", "", file.rstrip("/").rsplit("/", 1)[-1])
