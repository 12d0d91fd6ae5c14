"""The n-gram rules against a slow reading of the paper, and every decision that follows from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tulu_hpc.curation.decontamination import EvalSet, TrainSet, compare, decontaminate, tokenize, user_turns
from tulu_hpc.data.records import RecordError, read_records, write_jsonl

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


def slow_score(fields: list[tuple[str, ...]], turn: tuple[str, ...], n: int) -> float:
    """The definition, token by token."""
    total = 0.0
    for text in fields:
        if len(text) < n:
            total += text == turn
            continue
        shared = {turn[i : i + n] for i in range(len(turn) - n + 1)}
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
                    for turn in user_turns(row, "", 0):
                        score = slow_score(fields, tokenize(turn), n)
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


def test_more_than_half_of_the_tokens_of_one_training_turn(tmp_path: Path) -> None:
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
    # The two halves in two rows, or in two turns of one row, never add up.
    split = train(tmp_path, sft(" ".join(words[:8])), sft(" ".join(words[8:])), name="c")
    turns = train(tmp_path, sft(" ".join(words[:8]), " ".join(words[8:])), name="d")
    assert compare(split, [test])[0].matches == compare(turns, [test])[0].matches == []
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
    with pytest.raises(ValueError, match="'train' is given twice"):
        decontaminate([twice, twice], [evals(PROMPT)], None)
