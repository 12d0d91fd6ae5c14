"""Scores of single answers, worked out by hand."""

import json

import pytest

from tests.verifiers.instruction_cases import CASES
from tulu_hpc.verifiers import check_record, register, verifier_names, verify
from tulu_hpc.verifiers.constraints import CONSTRAINTS
from tulu_hpc.verifiers.gsm8k import last_number, reference_answer, shows_working
from tulu_hpc.verifiers.ifeval import follow_loose, follow_strict, parse_instructions


def math_score(completion, truth, rules="fixed"):
    return verify({"dataset": "gsm8k", "ground_truth": truth}, completion, rules).score


@pytest.mark.parametrize(
    ("completion", "truth", "fixed", "compat"),
    [
        ("12+2=14\nThe answer is 14.", "14", 1, 1),
        ("The answer is 14", "15", 0, 0),
        ("First 14, then 3.", "14", 0, 0),
        ("It costs $1,234.", "1234", 1, 1),
        ("It costs 1,234,567", "1234567", 1, 1),
        ("It is -5.", "-5", 1, 0),
        ("It is -5.", "5", 0, 1),
        ("3-8 = -5", "-5", 1, 0),
        ("so 12-5", "5", 1, 1),
        ("x=(2)-5", "5", 1, 1),
        ("The answer is 7.0", "7", 1, 0),
        ("The answer is 7.", "7.0", 1, 0),
        ("The answer is .5", "0.5", 1, 0),
        ("-$3", "-3", 1, 0),
        ("seven", "7", 0, 0),
        ("", "7", 0, 0),
    ],
)
def test_gsm8k(completion, truth, fixed, compat):
    assert math_score(completion, truth) == fixed
    assert math_score(completion, truth, "tulu3-compat") == compat


def test_gsm8k_reference():
    assert reference_answer("He has 3+4=<<3+4=7>>7.\n#### 1,070") == "1070"
    with pytest.raises(ValueError, match="####"):
        reference_answer("It is 7.")
    with pytest.raises(ValueError, match="not a number"):
        reference_answer("#### seven")
    assert last_number("no") is None
    assert shows_working("1+1=2\nThe answer is 2.") and not shows_working("The answer is 2.")


def test_every_constraint_has_a_case():
    assert set(CASES) == set(CONSTRAINTS)
    assert len([name for name in CONSTRAINTS if not name.startswith(("tulu:", "content:"))]) == 54


@pytest.mark.parametrize("name", sorted(CASES))
def test_constraint(name):
    kwargs, right, wrong = CASES[name]
    for text in right:
        assert follow_strict(text, [(name, kwargs)]) == [True], text
    for text in wrong:
        assert follow_strict(text, [(name, kwargs)]) == [False], text


def test_loose_variants():
    lower = [("change_case:english_lowercase", {})]
    assert follow_strict("Sure:\nall low", lower) == [False]
    assert follow_loose("Sure:\nall low", lower) == [True]  # first line dropped
    assert follow_loose("all low\nCheers", lower) == [True]  # last line dropped
    assert follow_loose("Sure:\nall low\nCheers", lower) == [True]  # both
    assert follow_loose("Sure:\nNot\nCheers", lower) == [False]
    quotes = [("startend:quotation", {})]
    assert follow_loose('**"a"**', quotes) == [True]  # asterisks dropped
    assert follow_loose("", [("punctuation:no_comma", {})]) == [False]
    # Each instruction may be met by another variant.
    both = [("startend:quotation", {}), ("detectable_format:number_bullet_lists", {"num_bullets": 1})]
    assert follow_loose('*"a"\n* b', both)[1] is True


def test_both_formats_give_the_same_instructions():
    old = {"func_name": "verify_bullet_points", "N": 3, "keyword_list": None, "end_phrase": "stale"}
    new = {"instruction_id": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": 3, "N": None}]}
    wanted = [("detectable_format:number_bullet_lists", {"num_bullets": 3})]
    for truth in (old, json.dumps(old), [json.dumps(old)], new, [new], json.dumps([new])):
        assert parse_instructions(truth) == wanted
    other = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}
    assert parse_instructions(other) == [("punctuation:no_comma", {})]
    lowercase = {"func_name": "validate_lowercase", "N": None}
    record = {"dataset": ["ifeval"], "ground_truth": [lowercase]}
    assert [verify(record, text).score for text in ("low", "Up")] == [1.0, 0.0]
    assert lowercase == {"func_name": "validate_lowercase", "N": None}  # not changed by use


def test_compat_keeps_the_papers_behaviour():
    def scores(truth, text):
        record = {"dataset": "ifeval", "ground_truth": json.dumps(truth)}
        return [verify(record, text, rules).score for rules in ("fixed", "tulu3-compat")]

    assert scores({"func_name": "validate_placeholders", "N": 5}, "none") == [0.0, 1.0]
    assert scores({"func_name": "validate_lowercase"}, "123") == [0.0, 1.0]
    assert scores({"func_name": "validate_end", "end_phrase": "bye"}, "so Bye") == [1.0, 0.0]
    assert scores({"func_name": "validate_forbidden_words", "forbidden_words": ["sun"]}, "sunny") == [1.0, 0.0]
    assert scores({"func_name": "verify_bullet_points", "N": 1}, "**bold** text") == [0.0, 1.0]
    assert scores({"func_name": "validate_quotation"}, '"') == [0.0, 1.0]


def test_all_instructions_must_be_followed():
    truth = {"instruction_id": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, {}]}
    record = {"dataset": "ifeval", "ground_truth": [truth]}
    verdict = verify(record, "No comma")
    assert verdict.score == 0.0 and "english_lowercase" in verdict.reason
    assert verdict.metrics == {"loose": 0.0, "instruction_strict": 0.5, "instruction_loose": 0.5}


def test_several_verifiers_give_the_mean():
    record = {"dataset": ["gsm8k", "ifeval"], "ground_truth": ["7", {"func_name": "validate_no_commas"}]}
    assert verify(record, "7").score == 1.0
    assert verify(record, "7, perhaps").score == 0.5


NO_NUMBERS = [
    "nan",
    "NaN",
    "inf",
    "-Infinity",
    "1_0",
    "1,5",
    "1,0000",
    "0x10",
    "",
    "1e9999",
    "5 apples",
    True,
    float("nan"),
    {},
]


@pytest.mark.parametrize(
    ("truth", "value"),
    [
        ("1,000", "1000"),
        ("$1,234,567.50", "1234567.5"),
        (-3, "-3"),
        (7.0, "7"),
        ("+.5", "0.5"),
        ("1e3", "1000"),
        (" 7. ", "7"),
    ],
)
def test_gsm8k_ground_truths(truth, value):
    check_record({"dataset": "gsm8k", "ground_truth": truth})
    assert math_score(f"The answer is {value}", truth) == 1


def test_compat_takes_any_ground_truth_but_none():
    """It compares texts, so a comma in the ground truth is never met; that stays as it was."""
    for truth, score in (("nan", 0), ("1,000", 0), ("1000", 1)):
        check_record({"dataset": "gsm8k", "ground_truth": truth}, "tulu3-compat")
        assert math_score("It is 1,000", truth, "tulu3-compat") == score
    for call in (lambda r: check_record(r, "tulu3-compat"), lambda r: verify(r, "None", "tulu3-compat")):
        with pytest.raises(ValueError, match="gsm8k: the ground truth is null"):
            call({"dataset": "gsm8k", "ground_truth": None})


COUNT, TEXT, TEXTS = "need a count", "need a text that is not blank", "need a list of texts that are not blank"


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        *(("detectable_format:number_bullet_lists", {"num_bullets": n}, COUNT) for n in ("3", 2.5, True, -1, [3])),
        ("detectable_content:number_placeholders", {"num_placeholders": "many"}, COUNT),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "need 'at least' or 'less than'"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": ["at least"]}, "need 'at least' or"),
        ("keywords:frequency", {"keyword": ["a"], "frequency": 2}, TEXT),
        ("keywords:frequency", {"keyword": "a", "frequency": "2"}, COUNT),
        *(
            ("keywords:existence", {"keywords": words}, TEXTS)
            for words in ([], "sun", ["sun", 3], ["sun", " "], {"a": 1})
        ),
        ("keywords:forbidden_words", {"forbidden_words": [None]}, TEXTS),
        *(("startend:end_checker", {"end_phrase": phrase}, TEXT) for phrase in (3, "", ["bye"])),
        ("language:response_language", {"language": 3}, TEXT),
        ("content:words_from_set", {"words": "cat"}, TEXTS),
        ("content:words_from_set", {"words": ["cat"], "at_least": "2"}, COUNT),
    ],
)
def test_arguments_that_a_constraint_cannot_use_are_refused(name, kwargs, words):
    truth = {"instruction_id": [name], "kwargs": [kwargs]}
    for rules in ("fixed", "tulu3-compat"):
        with pytest.raises(ValueError, match=f"ifeval: instruction '{name}': .*{words}"):
            check_record({"dataset": "ifeval", "ground_truth": truth}, rules)
    with pytest.raises(ValueError, match="num_bullets is 'three', need a count"):
        check_record({"dataset": "ifeval", "ground_truth": {"func_name": "verify_bullet_points", "N": "three"}})


def test_deeply_nested_json_is_no_crash():
    for rules in ("fixed", "tulu3-compat"):
        record = {"dataset": "ifeval", "ground_truth": {"func_name": "validate_json_format"}}
        assert verify(record, "[" * 100_000, rules).score == 0.0


@pytest.mark.parametrize("name", sorted(CASES))
def test_good_arguments_are_taken(name):
    check_record({"dataset": "ifeval", "ground_truth": {"instruction_id": [name], "kwargs": [CASES[name][0]]}})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"dataset": "gsm8k"}, "ground_truth"),
        ({"ground_truth": "1"}, "dataset"),
        ({"dataset": "gsm9k", "ground_truth": "1"}, "gsm9k.*gsm8k"),
        ({"dataset": "gsm8k", "ground_truth": "one"}, "not a number"),
        ({"dataset": ["gsm8k", "ifeval"], "ground_truth": ["1"]}, r"as long as .dataset. \(2\)"),
        ({"dataset": [], "ground_truth": []}, "list of names"),
        ({"dataset": "ifeval", "ground_truth": "{"}, "not JSON"),
        ({"dataset": "ifeval", "ground_truth": {"func_name": "nothing"}}, "nothing.*validate_end"),
        ({"dataset": "ifeval", "ground_truth": {"instruction_id": ["a:b"], "kwargs": [{}]}}, "a:b"),
        ({"dataset": "ifeval", "ground_truth": {"func_name": "verify_bullet_points"}}, "num_bullets"),
        (
            {"dataset": "ifeval", "ground_truth": {"instruction_id": ["punctuation:no_comma"], "kwargs": [{"x": 1}]}},
            "no_comma.*x",
        ),
        (
            {"dataset": "ifeval", "ground_truth": {"instruction_id": ["punctuation:no_comma"], "kwargs": [{}, {}]}},
            "kwargs",
        ),
        ({"dataset": "ifeval", "ground_truth": {"other": 1}}, "func_name"),
        ({"dataset": "ifeval", "ground_truth": None}, "must be a mapping, got None"),
        ({"dataset": "ifeval", "ground_truth": "[" * 100_000}, "nested too deeply"),
        ({"dataset": "ifeval", "ground_truth": {"func_name": ["x"]}}, r"unknown func_name \['x'\]"),
        ({"dataset": "ifeval", "ground_truth": {"instruction_id": [["x"]]}}, r"list of names instruction_id, got \[\["),
        ({"dataset": "ifeval", "ground_truth": {"instruction_id": ["punctuation:no_comma"], "kwargs": 5}}, "got 5"),
        ({"dataset": "ifeval", "ground_truth": {"instruction_id": ["punctuation:no_comma"], "kwargs": {}}}, "got {}"),
        (
            {"dataset": "ifeval", "ground_truth": {"instruction_id": ["punctuation:no_comma"], "kwargs": [["a"]]}},
            r"kwargs must be a list of mappings or null, got \[\['a'\]\]",
        ),
        *(({"dataset": "gsm8k", "ground_truth": truth}, "not a number") for truth in NO_NUMBERS),
        ({"dataset": "gsm8k", "ground_truth": None}, "gsm8k: the ground truth is null"),
        ({"dataset": "gsm8k", "ground_truth": [None]}, "gsm8k: the ground truth is null"),
    ],
)
def test_records_that_cannot_be_verified_are_refused(record, words):
    with pytest.raises(ValueError, match=words):
        check_record(record)


def test_names():
    assert {"gsm8k", "ifeval"} <= set(verifier_names()) & set(verifier_names("tulu3-compat"))
    check_record({"dataset": "GSM8K", "ground_truth": ["18"]})
    with pytest.raises(ValueError, match="already"):
        register("GSM8K")(lambda completion, truth, record: None)


def test_response_language_of_the_old_format():
    truth = {"func_name": "validate_response_language", "language": "de"}
    for text, score in (("Das ist ein deutscher Satz über die Stadt.", 1), ("This is an English sentence.", 0)):
        record = {"dataset": "ifeval", "ground_truth": truth}
        assert verify(record, text, "fixed").score == verify(record, text, "tulu3-compat").score == score
