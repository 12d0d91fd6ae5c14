from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tulu_hpc.config.schema import MixSection
from tulu_hpc.data.mixing import MixResult, Source, mix
from tulu_hpc.data.records import read_records
from tulu_hpc.data.rows import RecordError, write_jsonl


def write(path: Path, name: str, count: int) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "ok"}]}
        for i in range(count)
    ]
    write_jsonl(path / f"{name}.jsonl", rows)
    return str(path / f"{name}.jsonl")


def prompts(result: MixResult, source: str) -> list[str]:
    return [row["messages"][0]["content"] for row in result.rows if row["source"] == source]


def test_counts_fractions_and_statistics(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path, name, n) for name, n in (("a", 10), ("b", 20), ("c", 8)))
    result = mix([Source("a", a), Source("b", b, count=5), Source("c", c, fraction=2.5)], "sft", 0)
    assert Counter(row["source"] for row in result.rows) == {"a": 10, "b": 5, "c": 20}
    assert set(Counter(prompts(result, "c")).values()) == {2, 3}, "whole copies, then a part"
    by_name = {s.name: s for s in result.statistics}
    assert [(s.available, s.taken, s.repeated, s.missing) for s in result.statistics] == [
        (10, 10, 0, 0),
        (20, 5, 0, 0),
        (8, 20, 12, 0),
    ]
    assert by_name["c"].share == 20 / 35 and by_name["a"].turns_mean == 2
    assert by_name["a"].characters_mean == 5.0
    half = mix([Source("b", b, fraction=0.25)], "sft", 0)
    assert len(half.rows) == 5 and len(set(prompts(half, "b"))) == 5
    short = mix([Source("a", a, count=12)], "sft", 0).statistics[0]
    assert (short.taken, short.missing, short.repeated) == (10, 2, 0), "a count never repeats rows"


def test_the_seed_decides_and_sources_do_not_disturb_each_other(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", 30), write(tmp_path, "b", 30)
    one = mix([Source("a", a, count=9), Source("b", b, count=9)], "sft", 1)
    assert one.rows == mix([Source("a", a, count=9), Source("b", b, count=9)], "sft", 1).rows
    assert one.rows != mix([Source("a", a, count=9), Source("b", b, count=9)], "sft", 2).rows
    alone = mix([Source("a", a, count=9)], "sft", 1)
    assert sorted(prompts(alone, "a")) == sorted(prompts(one, "a"))
    assert prompts(one, "a") != sorted(prompts(one, "a"))
    sources = [row["source"] for row in one.rows]
    assert sources != sorted(sources), "the mixture is shuffled as a whole"


@pytest.mark.parametrize("kind", ["sft", "preference", "labelled", "rlvr"])
def test_rows_of_a_mixture_are_records_of_its_kind(tmp_path: Path, kind) -> None:  # type: ignore[no-untyped-def]
    row = {
        "sft": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "labelled": {"prompt": "a", "completion": "b", "label": False},
        "rlvr": {"messages": [{"role": "user", "content": "a"}], "ground_truth": "1", "dataset": "gsm8k"},
    }[kind]
    write_jsonl(tmp_path / "in.jsonl", [{**row, "source": "old"}])
    result = mix([Source("new", str(tmp_path / "in.jsonl"))], kind, 0)
    write_jsonl(tmp_path / "out.jsonl", result.rows)
    before, after = read_records(tmp_path / "in.jsonl", kind)[0], read_records(tmp_path / "out.jsonl", kind)[0]
    assert (after.id, after.source, before.source) == (before.id, "new", "old")
    if kind == "rlvr":
        assert (result.rows[0]["ground_truth"], result.rows[0]["dataset"]) == ("1", "gsm8k")


@pytest.mark.parametrize("kind", ["preference", "labelled"])
def test_a_mixture_keeps_the_weights(tmp_path: Path, kind) -> None:  # type: ignore[no-untyped-def]
    row = {"preference": {"chosen": "b", "rejected": "c"}, "labelled": {"completion": "b", "label": True}}[kind]
    source = [Source("in", str(tmp_path / "in.jsonl"))]
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"{i}", **row, "worth": i / 4} for i in range(4)])
    rows = mix(source, kind, 0, weight_field="worth").rows
    assert {each["prompt"][0]["content"]: each["worth"] for each in rows} == {f"{i}": i / 4 for i in range(4)}
    write_jsonl(tmp_path / "out.jsonl", rows)
    again = read_records(tmp_path / "out.jsonl", kind, weight_field="worth")
    before = read_records(tmp_path / "in.jsonl", kind, weight_field="worth")
    assert {each.id for each in again} == {each.id for each in before}, "the weight is a part of the id"
    with pytest.raises(RecordError, match=r"in.jsonl:1: value: is missing, it is the weight of the row"):
        mix(source, kind, 0, weight_field="value")


def test_weights_that_no_row_can_have() -> None:
    values = {"sources": [{"name": "a", "path": "a"}], "output": "o", "weight_field": "label"}
    with pytest.raises(ValueError, match="'label', which holds something else"):
        MixSection.model_validate(values | {"kind": "labelled"})
    with pytest.raises(ValueError, match="rows of kind sft have no weight"):
        MixSection.model_validate(values)


def test_problems_are_named(tmp_path: Path) -> None:
    a = write(tmp_path, "a", 3)
    with pytest.raises(ValueError, match="'a' is given twice"):
        mix([Source("a", a), Source("a", a)], "sft", 0)
    with pytest.raises(ValueError, match="'a' has both"):
        mix([Source("a", a, count=1, fraction=0.5)], "sft", 0)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "{}\n")
    with pytest.raises(RecordError, match=r"bad.jsonl:4: messages"):
        mix([Source("bad", str(tmp_path / "bad.jsonl"))], "sft", 0)
    result = mix([Source("bad", str(tmp_path / "bad.jsonl"))], "sft", 0, on_error="skip")
    assert (result.statistics[0].skipped, len(result.skipped)) == (1, 1)
