"""Record schemas and their readers: JSONL (also .gz), Parquet, directories of these, Hugging Face data sets.

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

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

RecordKind = Literal["sft", "preference", "rlvr"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%+-]+)?")
# Data set ids have versions in them (`llama-3.1-tulu`), so a suffix is letters first: `.txt`, `.jsonl`, `.gz`.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = ("system", "user", "assistant", "tool")
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions, in the form that the chat template expects


class RecordError(ValueError):
    """A row that does not fit its schema.

    Attributes:
        file: path or data set id.
        line: 1-based line of a JSONL file, or 1-based row otherwise.
        field: dotted name of the offending field; empty when the row as a whole is wrong.
    """

    def __init__(self, message: str, *, file: str, line: int, field: str = "") -> None:
        super().__init__(f"{file}:{line}: {field + ': ' if field else ''}{message}")
        self.file, self.line, self.field = file, line, field


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


NOT_TEXT = "holds half of a surrogate pair, which is no text"
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
            raise _FieldError("source", f"is {_show(source)}, need a string")
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
        raise _FieldError("dataset", f"is {_show(row['dataset'])}, need a name or a list of names")
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
        raise _FieldError(name, f"is {_show(value)}, need a list of at least one message")
    messages = []
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, Mapping):
            raise _FieldError(where, f"is {_show(message)}, need an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _FieldError(f"{where}.role", f"is {_show(role)}, need one of {', '.join(ROLES)}")
        extra = _extra(message, role, where)
        if content is None and "tool_calls" in extra:
            content = ""
        if not isinstance(content, str):
            raise _FieldError(f"{where}.content", f"is {_show(content)}, need a string")
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
            raise _FieldError(f"{where}.tool_calls", f"is {_show(calls)}, need a list")
        extra["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for name in ("tool_call_id", "name"):
        value = message.get(name)
        if role == "tool" and value:
            if not isinstance(value, str) or not is_text(value):
                raise _FieldError(f"{where}.{name}", f"is {_show(value)}, need a string")
            extra[name] = value
    return extra


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """`{"id", "type": "function", "function": {"name", "arguments"}}`; arguments may come as the text of an object,
    which is how tables hold objects of different keys."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _FieldError(where, f"is {_show(call)}, need a function with a name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise _FieldError(f"{where}.function.arguments", f"not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise _FieldError(f"{where}.function.arguments", f"is {_show(arguments)}, need an object")
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
        raise _FieldError("tools", f"is {_show(value)}, need a list of objects")
    try:
        json_text(value)
    except ValueError as error:
        raise _FieldError("tools", str(error)) from None
    return tuple(value)


def iterate_rows(path: str | Path) -> Iterator[tuple[str, int, dict[str, Any] | RecordError]]:
    """(file, line, row) of every row; a row that is no JSON object comes as the RecordError that says so.

    Raises:
        FileNotFoundError: nothing is there.
        RecordError: from here on the file cannot be read (cut off, damaged).
        ValueError: an unknown file type, or a data set that cannot be loaded.
    """
    local = Path(path)
    if local.is_dir():
        yield from _directory_rows(local)
    elif local.is_file():
        yield from _file_rows(local)
    elif is_hub_id(str(path)):
        yield from _hub_rows(str(path))
    else:
        raise FileNotFoundError(f"{path}: no such file or directory")


def is_hub_id(name: str) -> bool:
    """Whether a name that is nothing local is a Hugging Face id, `owner/name` or `owner/name:split`.

    A file suffix, or a folder of the owner's name here, makes it a local path that was mistyped.
    """
    if not HUB_ID.fullmatch(name):
        return False
    repository = Path(name.partition(":")[0])
    return not _FILE_SUFFIX.fullmatch(repository.suffix) and not repository.parent.exists()


def _directory_rows(directory: Path) -> Iterator[tuple[str, int, dict[str, Any] | RecordError]]:
    if (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file():
        for line, row in enumerate(_import_datasets(str(directory)).load_from_disk(str(directory)), 1):
            yield str(directory), line, dict(row)
        return
    files = sorted(p for p in directory.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
    if not files:
        raise FileNotFoundError(f"{directory}: holds no .jsonl, .jsonl.gz or .parquet file")
    for file in files:
        yield from _file_rows(file)


def _file_rows(file: Path) -> Iterator[tuple[str, int, dict[str, Any] | RecordError]]:
    name = str(file)
    if name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_rows(file)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(file)
    else:
        raise ValueError(f"{file}: unknown file type, need .jsonl, .jsonl.gz or .parquet")


def _json_rows(file: Path) -> Iterator[tuple[str, int, dict[str, Any] | RecordError]]:
    name, line = str(file), 0
    with gzip.open(file, "rb") if name.endswith(".gz") else file.open("rb") as stream:
        while True:
            line += 1
            try:
                text = stream.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise RecordError(f"cannot be read from here on: {error}", file=name, line=line) from None
            if not text:
                return
            if text.strip():
                yield name, line, _json_row(text, name, line)


def _parquet_rows(file: Path) -> Iterator[tuple[str, int, dict[str, Any] | RecordError]]:
    import pyarrow
    import pyarrow.parquet as parquet

    name, line = str(file), 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for index in range(batch.num_rows):
                line += 1
                try:
                    row = {key: column[index].as_py() for key, column in zip(batch.schema.names, batch.columns)}
                except ValueError as error:  # text that is not UTF-8, a time that Python has no date for
                    yield name, line, RecordError(f"cannot be read: {error}", file=name, line=line)
                else:
                    yield name, line, row
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(f"cannot be read from here on: {_one_line(error)}", file=name, line=line + 1) from None


def _json_row(text: bytes, file: str, line: int) -> dict[str, Any] | RecordError:
    try:
        row = json.loads(text)
    except ValueError as error:  # a syntax error, or bytes that are not UTF-8
        return RecordError(f"not JSON: {error}", file=file, line=line)
    except RecursionError:
        return RecordError("nested too deeply", file=file, line=line)
    if not isinstance(row, dict):
        return RecordError(f"is {_show(row)}, need an object", file=file, line=line)
    return row


def _hub_rows(name: str) -> Iterator[tuple[str, int, dict[str, Any] | RecordError]]:
    repository, _, split = name.partition(":")
    datasets = _import_datasets(name)
    try:
        data = datasets.load_dataset(repository, split=split or "train")
    except (OSError, ValueError) as error:  # no network and not cached, no such data set or split, no permission
        raise ValueError(
            f"{name}: no such file here, and as a Hugging Face data set it cannot be loaded: {error}"
        ) from error
    for line, row in enumerate(data, 1):
        yield name, line, dict(row)


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: reading it needs `pip install tulu_hpc[datasets]`") from None
    return datasets


def is_text(text: str) -> bool:
    """Whether every character can be written as UTF-8; JSON can spell halves of surrogate pairs, which cannot."""
    return text.isascii() or _SURROGATE.search(text) is None


def json_text(value: Any) -> str:
    """A value as JSON on one line.

    Raises:
        ValueError: it holds something that JSON or UTF-8 has no form for: a date, bytes, half of a surrogate pair.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"cannot be written as JSON: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not is_text(text):
        raise ValueError(NOT_TEXT)
    return text


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines; the file appears whole or not at all. Returns the number of rows."""
    return write_lines(path, map(json_text, rows))


def write_lines(path: str | Path, lines: Iterable[str]) -> int:
    """As `write_jsonl`, of rows that are JSON text already."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    count = 0
    open_text = gzip.open if target.suffix == ".gz" else open
    with open_text(partial, "wt", encoding="utf-8") as stream:
        for line in lines:
            stream.write(line + "\n")
            count += 1
    partial.replace(target)
    return count


def message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain JSON objects."""
    return [message.to_dict() for message in messages]


def _stem(file: str) -> str:
    return re.sub(r"\.(jsonl|jsonl\.gz|parquet)$", "", file.rstrip("/").rsplit("/", 1)[-1])


def _show(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
