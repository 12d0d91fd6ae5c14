"""The n-gram rules against a slow reading of the paper, and every decision that follows from them."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tulu_hpc.curation import decontamination
from tulu_hpc.curation.decontamination import (
    EvalIndex,
    EvalSet,
    SourceResult,
    TrainSet,
    decontaminate,
    tokenize,
    user_turns,
)
from tulu_hpc.data.records import read_records
from tulu_hpc.data.rows import RecordError, write_jsonl

PROMPT = "Tom has twelve red apples and gives three of them to Ann today"


def sft(*users: str) -> dict[str, Any]:
    messages = []
    for text in users:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "an answer"}]
    return {"messages": messages}


def train(path: Path, *rows: dict[str, Any], name: str = "train") -> TrainSet:
    write_jsonl(path / f"{name}.jsonl", rows)
    return TrainSet(name, str(path / f"{name}.jsonl"))


def evals(*prompts: str, name: str = "dev", unseen: bool = False) -> EvalSet:
    return EvalSet(name, [[tokenize(prompt)] for prompt in prompts], unseen)


def compare(source: TrainSet, sets: list[EvalSet], *, ngram: int = 8, **options: Any) -> tuple[SourceResult, set[int]]:
    return decontamination.compare(source, EvalIndex(sets, ngram), **options)


def slow_score(fields: list[tuple[str, ...]], turns: list[tuple[str, ...]], n: int) -> float:
    """The definition, token by token."""
    total = 0.0
    for text in fields:
        if len(text) < n:
            total += text in turns
            continue
        shared = {turn[i : i + n] for turn in turns for i in range(len(turn) - n + 1)}
        hits = sum(
            any(text[start : start + n] in shared for start in range(max(0, t - n + 1), min(t, len(text) - n) + 1))
            for t in range(len(text))
        )
        total += hits / len(text)
    return total / len(fields)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_scores_equal_the_definition_on_random_text(tmp_path: Path, n: int) -> None:
    rng = random.Random(n)

    def text(low: int) -> str:
        return " ".join(rng.choice("abc") for _ in range(rng.randint(low, 9)))

    compared = 0
    for trial in range(25):
        sets = [
            EvalSet(f"e{k}", [[tokenize(text(1)) for _ in range(rng.randint(1, 3))] for _ in range(3)])
            for k in range(2)
        ]
        rows = [sft(*(text(1) for _ in range(rng.randint(1, 2)))) for _ in range(4)]
        source = train(tmp_path, *rows, name=f"t{trial}")
        result, _ = compare(source, sets, ngram=n, match_threshold=0.3)
        expected = set()
        for each in sets:
            for instance, fields in enumerate(each.instances):
                for number, row in enumerate(rows, 1):
                    score = slow_score(fields, [tokenize(turn) for turn in user_turns(row, "", 0)], n)
                    if score > 0.3:
                        expected.add((each.name, instance, number, round(score, 4)))
        got = {(m.eval, m.instance, m.row, m.score) for m in result.matches}
        assert {g[:3] for g in got} == {e[:3] for e in expected}
        assert got == expected
        compared += len(expected)
    assert compared > 50


def test_words_are_split_and_lowered_as_in_the_paper() -> None:
    assert tokenize('Hi, "Tom"! (a-b);\nc:\\d?  E.') == ("hi", "tom", "a", "b", "c", "d", "e")
    assert tokenize(" ...\n") == ()


def test_more_than_half_of_the_tokens_of_one_training_row(tmp_path: Path) -> None:
    """16 words: 8 matched are exactly half and do not count, 9 do."""
    words = [f"w{i}" for i in range(16)]
    test = evals(" ".join(words))
    half, more = (
        train(tmp_path, sft(" ".join(words[:8])), name="a"),
        train(tmp_path, sft(" ".join(words[:9])), name="b"),
    )
    assert compare(half, [test])[0].matches == []
    (match,) = compare(more, [test])[0].matches
    assert (match.score, match.spans) == (9 / 16, [" ".join(words[:9])])
    # The two halves in two rows never add up, in two turns of one row they do: a row is a training instance.
    split = train(tmp_path, sft(" ".join(words[:8])), sft(" ".join(words[8:])), name="c")
    assert compare(split, [test])[0].matches == []
    turns = train(tmp_path, sft(" ".join(words[:8]), " ".join(words[8:])), name="d")
    (match,) = compare(turns, [test])[0].matches
    assert match.score == 1.0
    # What several turns share counts once, and a run of words does not go on in the next turn.
    again = train(tmp_path, sft(" ".join(words[:8]), " ".join(words[:8])), name="f")
    cut = train(tmp_path, sft(" ".join(words[:4]), " ".join(words[4:])), name="g")
    assert compare(again, [test])[0].matches == []
    assert [m.score for m in compare(cut, [test])[0].matches] == [12 / 16]
    both = train(tmp_path, sft(" ".join(words[8:] + ["x"] + words[:8])), name="e")
    (match,) = compare(both, [test])[0].matches
    assert match.score == 1.0 and match.spans == [" ".join(words)]


def test_only_user_turns_are_compared(tmp_path: Path) -> None:
    quoting = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROMPT}]}
    system = {"messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Hi"}]}
    assert compare(train(tmp_path, quoting, system), [evals(PROMPT)])[0].matches == []
    second = sft("Hi", PROMPT.upper() + "!!")
    preference = {"prompt": PROMPT, "chosen": "a", "rejected": "b"}
    conversation = {"chosen": sft(PROMPT)["messages"], "rejected": sft("x")["messages"]}
    result, _ = compare(train(tmp_path, second, preference, conversation), [evals(PROMPT)])
    assert [m.row for m in result.matches] == [1, 2, 3]


def test_short_prompts_match_as_a_whole_only(tmp_path: Path) -> None:
    test = evals("Name two colors.")
    result, _ = compare(train(tmp_path, sft("name TWO colors"), sft("Please name two colors")), [test])
    assert [(m.row, m.score, m.spans) for m in result.matches] == [(1, 1.0, ["name two colors"])]


def test_fields_are_averaged_and_empty_ones_left_out(tmp_path: Path) -> None:
    passage = " ".join(f"p{i}" for i in range(10))
    write_jsonl(
        tmp_path / "drop.jsonl", [{"passage": passage, "question": PROMPT}, {"passage": "", "question": PROMPT}]
    )
    test = EvalSet.read("drop", str(tmp_path / "drop.jsonl"), ["passage", "question"])
    result, _ = compare(train(tmp_path, sft(PROMPT)), [test], match_threshold=0.49)
    assert [(m.instance, m.score) for m in result.matches] == [(0, 0.5), (1, 1.0)]
    assert [m.instance for m in compare(train(tmp_path, sft(PROMPT)), [test])[0].matches] == [1]


def test_empty_instances_never_match(tmp_path: Path) -> None:
    result, _ = compare(train(tmp_path, sft("...")), [EvalSet("e", [[]])])
    assert (result.matches, result.evals[0].instances) == ([], 1)


def prompts(count: int) -> list[str]:
    return [" ".join(f"q{i}w{j}" for j in range(10)) for i in range(count)]


@pytest.mark.parametrize(
    ("leaked", "unseen", "action", "kept", "taken"),
    [
        (2, False, "paper", 4, "none"),  # exactly 2 % is not more than 2 %
        (3, False, "paper", 2, "drop rows"),
        (3, True, "paper", 0, "drop set"),
        (2, True, "paper", 4, "none"),
        (1, True, "drop_rows", 2, "drop rows"),
        (3, True, "drop_rows", 2, "drop rows"),
        (3, True, "report", 5, "none"),
    ],
)
def test_the_two_percent_rule_and_its_actions(
    tmp_path: Path, leaked: int, unseen: bool, action: Any, kept: int, taken: str
) -> None:
    texts = prompts(100)
    rows = [sft("first harmless"), *(sft(text) for text in texts[:leaked]), sft("last harmless")]
    report = decontaminate([train(tmp_path, *rows)], [evals(*texts, unseen=unseen)], tmp_path / "clean", action=action)
    (source,) = report.sources
    (overlap,) = source.evals
    assert (overlap.overlapping, overlap.rate, overlap.rows) == (leaked, leaked / 100, leaked)
    assert overlap.contaminated == (leaked > 2) and overlap.action == taken
    assert source.kept == kept and source.removed == len(rows) - kept and source.dropped == (taken == "drop set")
    clean = tmp_path / "clean" / "train.jsonl"
    if action == "report":
        assert not clean.exists()
    elif kept == 0:
        assert clean.read_text() == ""
    else:
        left = [record.messages[0].content for record in read_records(clean, "sft")]
        assert left[0] == "first harmless" and left[-1] == "last harmless" and len(left) == kept


def test_many_copies_of_one_prompt_are_one_overlapping_instance(tmp_path: Path) -> None:
    texts = prompts(100)
    result, remove = compare(train(tmp_path, *[sft(texts[0])] * 50), [evals(*texts)], action="paper")
    assert (result.evals[0].overlapping, result.evals[0].rows, remove) == (1, 50, set())


def test_other_fields_of_clean_rows_are_kept(tmp_path: Path) -> None:
    row = {**sft("harmless"), "extra": {"a": [1, None]}, "id": "x"}
    decontaminate([train(tmp_path, row, sft(PROMPT))], [evals(PROMPT)], tmp_path / "clean", action="drop_rows")
    assert (tmp_path / "clean" / "train.jsonl").read_text().count("\n") == 1
    assert '"extra": {"a": [1, null]}' in (tmp_path / "clean" / "train.jsonl").read_text()


def test_planted_leaks_are_scored(tmp_path: Path) -> None:
    texts = prompts(4)
    rows = [sft("harmless"), sft(texts[0]), sft(texts[1]), sft("gone"), sft(texts[2])]
    planted = [
        {"source": "train", "line": 2, "edit": "verbatim"},
        {"source": "train", "line": 3, "edit": "verbatim"},
        {"source": "train", "line": 4, "edit": "rewritten"},
    ]
    report = decontaminate([train(tmp_path, *rows)], [evals(*texts)], None, action="drop_rows", planted=planted)
    assert report.planted == {
        "planted": 3,
        "found": 2,
        "recall": 2 / 3,
        "removed": 2,
        "by_edit": {"rewritten": {"planted": 1, "found": 0}, "verbatim": {"planted": 2, "found": 2}},
        "false_drops": 1,
        "false_drop_share": 0.5,
    }


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"train.jsonl:2: messages: no messages, prompt or chosen"):
        compare(train(tmp_path, sft("x"), {"text": "y"}), [evals(PROMPT)])
    with pytest.raises(RecordError, match=r"train.jsonl:1: messages: has no user turn"):
        compare(train(tmp_path, {"messages": [{"role": "assistant", "content": "y"}]}), [evals(PROMPT)])
    write_jsonl(tmp_path / "eval.jsonl", [{"question": "x"}, {"prompt": "y"}])
    with pytest.raises(RecordError, match=r"eval.jsonl:2: question: is missing"):
        EvalSet.read("e", str(tmp_path / "eval.jsonl"), ["question"])
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="'e' is empty"):
        EvalSet.read("e", str(tmp_path / "none.jsonl"), ["question"])
    twice = train(tmp_path, sft("x"))
    with pytest.raises(ValueError, match="training set 'train' is given twice"):
        decontaminate([twice, twice], [evals(PROMPT)], None)
    with pytest.raises(ValueError, match="evaluation 'dev' is given twice"):
        decontaminate([twice], [evals(PROMPT), evals("other")], None)
    with pytest.raises(ValueError, match=r"none\.jsonl: the training set 'n' is empty"):
        decontaminate([TrainSet("n", str(tmp_path / "none.jsonl"))], [evals(PROMPT)], None)
    write_jsonl(tmp_path / "eval.jsonl", [{"a": "x", "b": ""}, {"a": "...", "b": ""}])
    with pytest.raises(RecordError, match=r"eval\.jsonl:2: a, b: no word to compare"):
        EvalSet.read("e", str(tmp_path / "eval.jsonl"), ["a", "b"])
    (tmp_path / "eval.jsonl").write_text('{"a": 3}\n')
    with pytest.raises(RecordError, match=r"eval\.jsonl:1: a: has no user turn with text"):
        EvalSet.read("e", str(tmp_path / "eval.jsonl"), ["a"])
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    with pytest.raises(RecordError, match=r"half\.jsonl:1: prompt: holds half of a surrogate pair"):
        EvalSet.read("e", str(tmp_path / "half.jsonl"), ["prompt"])
    with pytest.raises(RecordError, match=r"half\.jsonl:1: prompt: holds half of a surrogate pair"):
        compare(TrainSet("h", str(tmp_path / "half.jsonl")), [evals(PROMPT)])


def test_rows_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    """Only where they would be written: comparing them is no problem."""
    row = {**sft("harmless"), "made": datetime.datetime(2024, 1, 2)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "dated.parquet")
    dated = TrainSet("dated", str(tmp_path / "dated.parquet"))
    first = train(tmp_path, sft("first"))
    with pytest.raises(RecordError, match=r"dated\.parquet:1: made: cannot be written as JSON: .*datetime"):
        decontaminate([first, dated], [evals(PROMPT)], tmp_path / "clean", action="drop_rows")
    assert not (tmp_path / "clean" / "dated.jsonl").exists()
    assert decontaminate([dated], [evals(PROMPT)], tmp_path / "clean", action="report").sources[0].rows == 2
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "note": "\\ud800"}\n')
    half = TrainSet("half", str(tmp_path / "half.jsonl"))
    with pytest.raises(RecordError, match=r"half\.jsonl:1: note: holds half of a surrogate pair"):
        decontaminate([half], [evals(PROMPT)], tmp_path / "clean", action="drop_rows")


def test_counts_and_recall_are_of_all_rows_though_the_report_lists_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cap is of each pair of sets: many matches of one evaluation leave room for those of the next."""
    monkeypatch.setattr(decontamination, "MATCHES_KEPT", 2)
    other = "another question of more than eight words in all of it"
    rows = [sft(PROMPT)] * 5 + [sft(other)]
    planted = [{"source": "train", "line": line} for line in range(1, 7)]
    report = decontaminate(
        [train(tmp_path, *rows)],
        [evals(PROMPT), evals(other, name="second")],
        None,
        action="drop_rows",
        planted=planted,
    )
    (source,) = report.sources
    assert [(m.eval, m.row) for m in source.matches] == [("dev", 1), ("dev", 2), ("second", 6)]
    assert [(each.rows, each.matches) for each in source.evals] == [(5, 5), (1, 1)]
    assert report.planted is not None and report.planted["recall"] == 1.0 and report.planted["removed"] == 6
    assert "overlapping_rows" not in json.loads(json.dumps(report.to_json()))["sources"][0]


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        ({"source": "gone", "line": 1}, "source 'gone' is not among the training sets: train"),
        ({"source": "train", "line": 3}, "line 3 of 'train', which has 2 rows"),
        ({"source": "train", "line": 0, "where": "leaks.json: rows.7"}, "leaks.json: rows.7: line 0 of 'train'"),
    ],
)
def test_leaks_that_are_not_in_the_sets_are_refused(tmp_path: Path, leak: dict[str, Any], message: str) -> None:
    source = train(tmp_path, sft("a"), sft("b"))
    with pytest.raises(ValueError, match=message):
        decontaminate([source], [evals(PROMPT)], tmp_path / "clean", action="drop_rows", planted=[leak])
    assert not (tmp_path / "clean").exists()


def test_the_index_of_the_evaluations_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    add = EvalIndex._add
    monkeypatch.setattr(EvalIndex, "_add", lambda self, *arguments: built.append(1) or add(self, *arguments))
    decontaminate([train(tmp_path, sft("x"), name=name) for name in "abc"], [evals(PROMPT, "second")], None)
    assert len(built) == 2
