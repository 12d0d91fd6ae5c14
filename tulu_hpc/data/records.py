"""Record schemas, and records from the rows of a file or data set (`rows`).

| kind | fields |
|---|---|
| sft | `messages` |
| preference | `chosen`, `rejected` (messages or a string), optionally `prompt` (messages or a string) |
| labelled | `prompt`, `completion` (messages or a string), `label` (true: desirable) |
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from tulu_hpc.data.messages import FieldError, Message, Tools, read_messages, read_tools
from tulu_hpc.data.rows import NOT_TEXT, RecordError, is_text, iterate_rows, json_text, show

RecordKind = Literal["sft", "preference", "labelled", "rlvr"]

_LARGEST_WEIGHT = 1e6  # more is a mistake, and beyond what fp32 adds to other losses


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
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class LabelledRecord:
    """One answer, and whether it is a good one."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    source: str
    id: str
    tools: Tools = ()
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class RlvrRecord:
    """A prompt with what its verifiers need; `ground_truth[i]` belongs to `dataset[i]`."""

    messages: list[Message]
    ground_truth: list[Any]
    dataset: list[str]
    source: str
    id: str
    tools: Tools = ()


AnyRecord = SftRecord | PreferenceRecord | LabelledRecord | RlvrRecord
R = TypeVar("R", SftRecord, PreferenceRecord, LabelledRecord, RlvrRecord)


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
    path: str | Path,
    kind: Literal["preference"],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    weight_field: str | None = None,
) -> RecordSet[PreferenceRecord]: ...
@overload
def read_records(
    path: str | Path,
    kind: Literal["labelled"],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    weight_field: str | None = None,
) -> RecordSet[LabelledRecord]: ...
@overload
def read_records(
    path: str | Path,
    kind: Literal["rlvr"],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    check: Callable[[RlvrRecord], None] | None = None,
) -> RecordSet[RlvrRecord]: ...
@overload
def read_records(
    path: str | Path,
    kind: RecordKind,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    weight_field: str | None = None,
) -> RecordSet[Any]: ...
def read_records(
    path: str | Path,
    kind: RecordKind,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    check: Callable[[Any], None] | None = None,
    weight_field: str | None = None,
) -> Any:
    """Read and check every row of `path`.

    Args:
        path: a file, a directory of files, or a Hugging Face data set id (`owner/name`, or `owner/name:split`).
        kind: the schema.
        on_error: "raise" stops at the first malformed row; "skip" leaves it out and keeps the reason.
        check: of each rlvr record, whether its ground truth can be used; a ValueError makes the row malformed.
        weight_field: of preference and labelled rows, the field with their weight; each must have it.

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
            record = parse_record(row, kind, file=file, line=line, weight_field=weight_field)
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


def parse_record(
    row: Mapping[str, Any], kind: RecordKind, *, file: str, line: int, weight_field: str | None = None
) -> AnyRecord:
    """One record from one row of a file; `weight_field` as in `read_records`.

    Raises:
        RecordError: naming the field that does not fit the schema.
    """
    parsers: dict[RecordKind, Callable[[Mapping[str, Any], str, Tools], AnyRecord]]
    parsers = {"sft": _sft, "preference": _preference, "labelled": _labelled, "rlvr": _rlvr}
    source = row.get("source")
    if source is None and kind != "rlvr" and isinstance(row.get("dataset"), str):
        source = row["dataset"]  # as mixes of the hub say it; of an rlvr record it names the verifier
    try:
        if source is not None and not isinstance(source, str):
            raise FieldError("source", f"is {show(source)}, need a string")
        if source is not None and not is_text(source):
            raise FieldError("source", NOT_TEXT)
        record = parsers[kind](row, source or _stem(file), read_tools(row))
        return record if weight_field is None else _weighted(record, row, weight_field)
    except FieldError as error:
        raise RecordError(str(error), file=file, line=line, field=error.field) from None


def content_id(*parts: Any) -> str:
    """Stable id of a record: the first 64 bits of SHA-256 over its content as canonical JSON, in hex."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=Message.to_dict)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _sft(row: Mapping[str, Any], source: str, tools: Tools) -> SftRecord:
    messages = read_messages(row, "messages")
    if not any(message.role == "assistant" for message in messages):
        raise FieldError("messages", "has no assistant turn, there is nothing to train")
    return SftRecord(messages, source, content_id(messages, *tools), tools)


def _preference(row: Mapping[str, Any], source: str, tools: Tools) -> PreferenceRecord:
    sides = {name: _turns(row, name, "assistant") for name in ("chosen", "rejected")}
    lead = _turns(row, "prompt", "user") if row.get("prompt") is not None else []
    chosen, rejected = (_whole(lead, name, side) for name, side in sides.items())
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if chosen == rejected:
        raise FieldError("rejected", "is equal to chosen")
    if common == 0:
        raise FieldError("prompt", "is missing: chosen and rejected have no leading message in common")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[common].role != "assistant":
            raise FieldError(
                f"{name}[{common}]", f"role is {side[common].role!r}; the first message that differs must be an answer"
            )
    prompt = chosen[:common]
    answers = chosen[common:], rejected[common:]
    return PreferenceRecord(prompt, *answers, source, content_id(prompt, *answers, *tools), tools)


def _labelled(row: Mapping[str, Any], source: str, tools: Tools) -> LabelledRecord:
    prompt, completion = _turns(row, "prompt", "user"), _turns(row, "completion", "assistant")
    if completion[: len(prompt)] == prompt:  # the whole conversation, as some data sets have it
        completion = completion[len(prompt) :]
    if prompt[-1].role == "assistant":
        raise FieldError(f"prompt[{len(prompt) - 1}]", "the prompt ends with an assistant turn, nothing to answer")
    if not completion or completion[0].role != "assistant":
        raise FieldError("completion", "does not begin with an assistant turn: it must be the answer to the prompt")
    label = row.get("label")
    if not isinstance(label, bool):
        reason = "is missing" if label is None else f"is {show(label)}"
        raise FieldError("label", f"{reason}, need true (desirable) or false")
    return LabelledRecord(prompt, completion, label, source, content_id(prompt, completion, label, *tools), tools)


def _turns(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """Messages, or a string that is one turn of `role`."""
    if not isinstance(row.get(name), str):
        return read_messages(row, name)
    if not is_text(row[name]):
        raise FieldError(name, NOT_TEXT)
    return [Message(role, row[name])]


def _weighted(record: AnyRecord, row: Mapping[str, Any], name: str) -> AnyRecord:
    """The record with its weight, which is then a part of its id."""
    assert isinstance(record, PreferenceRecord | LabelledRecord)
    value = row.get(name)
    if value is None:
        raise FieldError(name, "is missing, it is the weight of the row")
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 0 <= value <= _LARGEST_WEIGHT:
        raise FieldError(name, f"is {show(value)}, need a weight: a number from 0 to {_LARGEST_WEIGHT:g}")
    return replace(record, weight=float(value), id=content_id(record.id, float(value)))


def _whole(lead: list[Message], name: str, side: list[Message]) -> list[Message]:
    """The conversation of one side: public data sets repeat the prompt inside both, ours do not; accept either."""
    if side[: len(lead)] == lead:
        return side
    if side[0].role == "assistant" or lead[-1].role != "user":
        return lead + side
    if all(message in side for message in lead):  # `prompt` is its last question, or leaves out the system turn
        return side
    raise FieldError("prompt", f"is not in {name}, which begins with a {side[0].role} turn of its own")


def _rlvr(row: Mapping[str, Any], source: str, tools: Tools) -> RlvrRecord:
    messages = read_messages(row, "messages")
    if messages[-1].role == "assistant":
        raise FieldError(f"messages[{len(messages) - 1}]", "the prompt ends with an assistant turn, nothing to answer")
    for name in ("ground_truth", "dataset"):
        if row.get(name) is None:
            raise FieldError(name, "is missing")
    ground_truth = row["ground_truth"] if isinstance(row["ground_truth"], list) else [row["ground_truth"]]
    dataset = row["dataset"] if isinstance(row["dataset"], list) else [row["dataset"]]
    if not dataset or not all(isinstance(name, str) and name for name in dataset):
        raise FieldError("dataset", f"is {show(row['dataset'])}, need a name or a list of names")
    if len(dataset) != len(ground_truth):
        raise FieldError("ground_truth", f"has {len(ground_truth)} entries for {len(dataset)} names in dataset")
    for name, value in (("ground_truth", ground_truth), ("dataset", dataset)):
        try:
            json_text(value)
        except ValueError as error:
            raise FieldError(name, str(error)) from None
    return RlvrRecord(
        messages, ground_truth, dataset, source, content_id(messages, ground_truth, dataset, *tools), tools
    )


def message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain JSON objects."""
    return [message.to_dict() for message in messages]


def _stem(file: str) -> str:
    return re.sub(r"\.(jsonl|jsonl\.gz|parquet)$", "", file.rstrip("/").rsplit("/", 1)[-1])
