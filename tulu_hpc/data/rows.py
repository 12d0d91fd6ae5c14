"""Rows of files, and files of rows: JSONL (also .gz), Parquet, directories of these, Hugging Face data sets.

What a row must hold is the business of `records`. No torch is imported here.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%+-]+)?")
# Data set ids have versions in them (`llama-3.1-tulu`), so a suffix is letters first: `.txt`, `.jsonl`, `.gz`.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
NOT_TEXT = "holds half of a surrogate pair, which is no text"


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
        return RecordError(f"is {show(row)}, need an object", file=file, line=line)
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


def show(value: object) -> str:
    """A value in an error message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
