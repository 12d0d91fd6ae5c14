from __future__ import annotations

import datetime
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tulu_hpc.data.records import Message, RlvrRecord, parse_record, read_records
from tulu_hpc.data.rows import RecordError, is_hub_id, write_jsonl

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SFT = {"messages": [USER, ANSWER], "source": "flan", "extra": 1}
RLVR = {"messages": [USER], "ground_truth": "14", "dataset": "gsm8k"}
PAIR = {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "hu"}]}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_the_same_records_from_every_format(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [SFT, {**SFT, "messages": [USER, {**ANSWER, "content": "höö 😀"}]}]
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert read_records(path, "sft").records == read_records(plain, "sft").records
    assert [r.source for r in read_records(path, "sft")] == ["flan", "flan"]
    assert len(read_records(tmp_path, "sft")) == 4, "a directory is all its files"


def test_a_saved_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([RLVR, RLVR]).save_to_disk(str(tmp_path / "set"))
    assert [r.dataset for r in read_records(tmp_path / "set", "rlvr")] == [["gsm8k"], ["gsm8k"]]


def test_ids_are_of_the_content_alone() -> None:
    first = parse_record(SFT, "sft", file="a.jsonl", line=1)
    again = parse_record({"messages": SFT["messages"], "source": "other"}, "sft", file="b.jsonl", line=9)
    assert first.id == again.id and len(first.id) == 16
    assert again.source == "other"
    other = parse_record({"messages": [USER, {**ANSWER, "content": "h"}]}, "sft", file="deep/c.jsonl.gz", line=1)
    assert other.id != first.id and other.source == "c"


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
        {"prompt": "hi", "chosen": "ho", "rejected": "hu"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": "hu"},
    ],
)
def test_all_forms_of_a_preference_are_one_record(row: dict[str, Any]) -> None:
    record = parse_record(row, "preference", file="p.jsonl", line=1)
    assert record == parse_record(PAIR, "preference", file="p.jsonl", line=1)
    assert (record.prompt, record.chosen) == ([Message("user", "hi")], [Message("assistant", "ho")])  # type: ignore[union-attr]


def test_several_verifiers_of_one_prompt() -> None:
    row = {**RLVR, "ground_truth": ["14", "x"], "dataset": ["gsm8k", "string"]}
    record = parse_record(row, "rlvr", file="r.jsonl", line=1)
    assert (record.ground_truth, record.dataset) == (["14", "x"], ["gsm8k", "string"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "row", "field", "message"),
    [
        ("sft", {"text": "x"}, "messages", "missing .fields of the row: text"),
        ("sft", {"messages": "x"}, "messages", "need a list"),
        ("sft", {"messages": []}, "messages", "at least one"),
        ("sft", {"messages": [USER]}, "messages", "no assistant turn"),
        ("sft", {"messages": [USER, "x"]}, "messages[1]", "need an object"),
        ("sft", {"messages": [USER, {"role": "bot", "content": "x"}]}, "messages[1].role", "bot"),
        ("sft", {"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "null"),
        ("sft", {"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1].content", "empty"),
        ("sft", {"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "messages[1].content", "surrogate"),
        ("sft", {**SFT, "source": 3}, "source", "3"),
        ("preference", {"chosen": "a", "rejected": "b"}, "prompt", "no leading message"),
        ("preference", {"prompt": "hi", "chosen": "a", "rejected": "a"}, "rejected", "equal"),
        ("preference", {"prompt": "hi", "chosen": [USER, USER], "rejected": "a"}, "chosen[1]", "must be an answer"),
        ("preference", {"prompt": "hi", "chosen": "a"}, "rejected", "missing"),
        ("rlvr", {"messages": [USER], "dataset": "x"}, "ground_truth", "missing"),
        ("rlvr", {**RLVR, "dataset": 3}, "dataset", "3"),
        ("rlvr", {**RLVR, "dataset": ["a", "b"]}, "ground_truth", "1 entries for 2"),
        ("rlvr", {**RLVR, "messages": [USER, ANSWER]}, "messages[1]", "nothing to answer"),
        ("rlvr", {**RLVR, "ground_truth": "\ud800"}, "ground_truth", "surrogate"),
        ("rlvr", {**RLVR, "dataset": "\ud800"}, "dataset", "surrogate"),
        ("sft", {**SFT, "source": "\ud800"}, "source", "surrogate"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(
    tmp_path: Path, kind: Any, row: dict[str, Any], field: str, message: str
) -> None:
    good = {"sft": SFT, "preference": PAIR, "rlvr": RLVR}[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (good, good, row, good)))
    with pytest.raises(RecordError, match=message) as caught:
        read_records(path, kind)
    error = caught.value
    assert (error.file, error.line, error.field) == (str(path), 3, field)
    assert str(error).startswith(f"{path}:3: {field}: ")
    skipping = read_records(path, kind, on_error="skip")
    assert len(skipping) == 3 and skipping.skipped == [str(error)]


def test_lines_that_are_no_json_objects(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(SFT).encode() + b'\n{"messages": [\n[1]\n\xff\xfe\n')
    with pytest.raises(RecordError, match=r"rows.jsonl:2: not JSON"):
        read_records(path, "sft")
    assert [s.split(": ")[0][-1] for s in read_records(path, "sft", on_error="skip").skipped] == ["2", "3", "4"]


def test_nesting_without_end_is_a_malformed_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(SFT) + "\n" + "[" * 100_000 + "\n" + json.dumps(SFT) + "\n")
    with pytest.raises(RecordError, match=r"rows\.jsonl:2: nested too deeply"):
        read_records(path, "sft")
    found = read_records(path, "sft", on_error="skip")
    assert (len(found), found.skipped) == (2, [f"{path}:2: nested too deeply"])


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_damaged_file_is_an_error_with_its_line(tmp_path: Path, on_error: Any) -> None:
    """What is lost cannot be counted, so `skip` does not help."""
    packed = gzip.compress("".join(f"{json.dumps({**SFT, 'n': n})}\n" for n in range(9)).encode())
    rows = pyarrow.Table.from_pylist([SFT] * 2000)
    pyarrow.parquet.write_table(rows, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    damaged = {
        "cut.jsonl.gz": packed[:-9],
        "flipped.jsonl.gz": packed[:-8] + bytes(4) + packed[-4:],
        "none.jsonl.gz": b"no gzip",
        "garbled.jsonl.gz": packed[:12] + b"\xff" * 40,
        "cut.parquet": whole[:-20],
        "garbled.parquet": whole[:4] + b"\xff" * 400 + whole[404:],
        "none.parquet": b"no parquet",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecordError, match=rf"{name}:\d+: cannot be read from here on: .") as caught:
            read_records(tmp_path / name, "sft", on_error=on_error)
        assert "\n" not in str(caught.value)


def test_a_value_that_cannot_be_read_is_a_malformed_row(tmp_path: Path) -> None:
    messages = pyarrow.array([SFT["messages"]] * 3)
    text = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages, "extra": text}), tmp_path / "rows.parquet")
    with pytest.raises(RecordError, match=r"rows\.parquet:2: cannot be read: .*utf-8"):
        read_records(tmp_path / "rows.parquet", "sft")
    found = read_records(tmp_path / "rows.parquet", "sft", on_error="skip")
    assert (len(found), len(found.skipped)) == (2, 1)


def test_a_ground_truth_that_json_cannot_hold(tmp_path: Path) -> None:
    row = {**RLVR, "ground_truth": datetime.date(2024, 1, 2)}
    with pytest.raises(RecordError, match=r"r:1: ground_truth: cannot be written as JSON: .*date"):
        parse_record(row, "rlvr", file="r", line=1)
    with pytest.raises(ValueError, match="surrogate"):
        write_jsonl(tmp_path / "out.jsonl", [{"a": "\ud800"}])


def test_what_may_be_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped local path never leaves this machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in (
        "foo/bar.txt",
        "foo/bar.jsonl",
        "foo/bar.json.gz",
        "foo/bar.csv:train",
        "data/mixture",
        "a/b/c",
        "abc",
    ):
        assert not is_hub_id(name), name
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            read_records(name, "sft")
    for name in (
        "allenai/tulu-3-sft-mixture",
        "allenai/llama-3.1-tulu-3-8b-preference-mixture:train[:10%]",
        "a/b_v1.0",
    ):
        assert is_hub_id(name), name


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        read_records(tmp_path / "gone.jsonl", "sft")
    with pytest.raises(FileNotFoundError, match="holds no"):
        read_records(tmp_path, "sft")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="unknown file type"):
        read_records(tmp_path / "a.csv", "sft")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no sft record, it is empty"):
        read_records(tmp_path / "empty.jsonl", "sft")
    with gzip.open(tmp_path / "bad.jsonl.gz", "wt") as stream:
        stream.write("{")
    with pytest.raises(ValueError, match="no sft record; first problem"):
        read_records(tmp_path / "bad.jsonl.gz", "sft", on_error="skip")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def rows():  # type: ignore[no-untyped-def]
        yield SFT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "out.jsonl", rows())
    assert not (tmp_path / "out.jsonl").exists()
    assert write_jsonl(tmp_path / "out.jsonl", [SFT, SFT]) == 2
    assert len(read_records(tmp_path / "out.jsonl", "sft")) == 2


SYSTEM, MORE = {"role": "system", "content": "be brief"}, {"role": "user", "content": "and?"}


@pytest.mark.parametrize("lead", [[SYSTEM, USER], [MORE, ANSWER, USER]])
def test_a_prompt_that_is_only_the_last_question_is_not_repeated(lead: list[dict[str, str]]) -> None:
    row = {"prompt": "hi", "chosen": [*lead, ANSWER], "rejected": [*lead, {**ANSWER, "content": "hu"}]}
    record = parse_record(row, "preference", file="p.jsonl", line=1)
    assert [m.to_dict() for m in record.prompt] == lead  # type: ignore[union-attr]


def test_a_prompt_that_is_another_question_is_refused() -> None:
    row = {"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "hu"}]}
    with pytest.raises(RecordError, match=r"p\.jsonl:7: prompt: is not in chosen, which begins with a user turn"):
        parse_record(row, "preference", file="p.jsonl", line=7)


def test_a_check_of_the_ground_truth_names_the_line(tmp_path: Path) -> None:
    """The line of the file, blank and skipped ones counted."""
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(["", "{", json.dumps(RLVR), json.dumps({**RLVR, "ground_truth": "x"})]))

    def check(record: RlvrRecord) -> None:
        float(record.ground_truth[0])

    found = read_records(path, "rlvr", on_error="skip", check=check)
    assert len(found) == 1
    assert found.skipped[1].startswith(f"{path}:4: ground_truth: could not convert")


def test_a_data_set_of_the_hub_without_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = "from tulu_hpc.data.records import read_records; read_records('nobody/nothing', 'sft')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: nobody/nothing: no such file here, and as a Hugging Face data set it cannot be")
