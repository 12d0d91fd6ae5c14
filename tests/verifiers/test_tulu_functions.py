"""The 25 constraint functions of the Tulu 3 data in both rule sets, scores worked out by hand."""

import pytest

from tulu_hpc.verifiers import check_record, verify
from tulu_hpc.verifiers.tulu_functions import COMPAT, FUNCTIONS

# function, arguments, response, score in `fixed`, score in `tulu3-compat`
ROWS = [
    ("verify_keywords", {"keyword_list": ["sun", "sea"]}, "Sunny seas", 1, 1),
    ("verify_keywords", {"keyword_list": ["sun", "sea"]}, "Sunny", 0, 0),
    ("verify_keyword_frequency", {"word": "sun", "N": 2}, "Sun, sun and sunny", 1, 1),
    ("verify_keyword_frequency", {"word": "ice cream", "N": 1}, "an ice cream", 1, 0),
    ("validate_forbidden_words", {"forbidden_words": ["sun"]}, "Sunny", 1, 0),
    ("validate_forbidden_words", {"forbidden_words": ["sun"]}, "the sun", 0, 0),
    ("verify_letter_frequency", {"letter": "a", "N": 2}, "A a b", 1, 0),
    ("verify_letter_frequency", {"letter": "a", "N": 1}, "A a b", 0, 1),
    ("validate_response_language", {"language": "de"}, "Das ist ein deutscher Satz über die Stadt.", 1, 1),
    ("verify_paragraph_count", {"N": 2}, "a\n* * *\nb", 1, 1),
    ("verify_paragraph_count", {"N": 2}, "a\n***\nb", 1, 0),
    ("verify_paragraph_count", {"N": 2}, "a\n* * *\nb\n* * *", 1, 0),
    ("validate_word_constraint", {"N": 3, "quantifier": "at least"}, "one - two", 0, 1),
    ("validate_word_constraint", {"N": 3, "quantifier": "around"}, "one two three four", 1, 1),
    ("validate_word_constraint", {"N": 3, "quantifier": "at most"}, "one two three four", 0, 0),
    ("verify_sentence_constraint", {"N": 2, "quantifier": "at least"}, "One! Two!", 1, 0),
    ("verify_sentence_constraint", {"N": 1, "quantifier": "at most"}, "One. Two. Three.", 0, 0),
    ("verify_sentence_constraint", {"N": 2, "quantifier": "around"}, "One. Two. Three.", 1, 1),
    ("validate_paragraphs", {"N": 2, "i": 2, "first_word": "sun"}, "a\n\nsunny", 0, 1),
    ("validate_paragraphs", {"N": 2, "i": 2, "first_word": "Sun"}, "a\n\nsun", 1, 0),
    ("validate_paragraphs", {"N": 1, "i": 2, "first_word": "Sun"}, "a", 0, 0),
    ("verify_postscript", {"postscript_marker": "P.S."}, "a\nP.S. b", 1, 1),
    ("verify_postscript", {"postscript_marker": "P.S."}, "the P.S. b", 0, 1),
    ("verify_postscript", {"postscript_marker": "P.S."}, "a\nP.S.", 0, 0),
    ("validate_placeholders", {"N": 3}, "none", 0, 1),
    ("validate_placeholders", {"N": 1}, "[a]", 1, 1),
    ("verify_bullet_points", {"N": 1}, "**bold**", 0, 1),
    ("verify_bullet_points", {"N": 2}, "* a\n- b", 1, 1),
    ("validate_title", {}, "<<a>>", 1, 1),
    ("validate_title", {}, "<<>>", 0, 1),
    ("validate_choice", {"options": ["yes", "no"]}, "y", 0, 1),
    ("validate_choice", {"options": ["yes", "no"]}, "Yes.", 1, 0),
    ("validate_choice", {"options": ["yes", "no"]}, "", 0, 1),
    ("validate_highlighted_sections", {"N": 1}, "*a*", 1, 1),
    ("validate_highlighted_sections", {"N": 2}, "**a**", 0, 1),
    ("validate_highlighted_sections", {"N": 1}, "* *", 0, 1),
    ("validate_sections", {"N": 2, "section_splitter": "Part"}, "Part 1\na\nPart 2\nb", 1, 1),
    ("validate_sections", {"N": 2, "section_splitter": "Part"}, "Intro\nPart 1\na\nPart 2\nb", 1, 0),
    ("validate_json_format", {}, '{"a": 1}', 1, 1),
    ("validate_json_format", {}, '```json\n{"a": 1}\n```', 1, 0),
    ("validate_repeat_prompt", {"original_prompt": "Say it."}, "Say it. It.", 1, 1),
    ("validate_repeat_prompt", {"original_prompt": "Say it."}, "say it. It.", 1, 0),
    ("validate_two_responses", {}, "a******b", 1, 1),
    ("validate_two_responses", {}, "a******", 0, 1),
    ("validate_uppercase", {}, "ALL", 1, 1),
    ("validate_uppercase", {}, "12", 0, 1),
    ("validate_lowercase", {}, "all", 1, 1),
    ("validate_lowercase", {}, "All", 0, 0),
    ("validate_frequency_capital_words", {"N": 1, "quantifier": "at least"}, "I am", 0, 1),
    ("validate_frequency_capital_words", {"N": 2, "quantifier": "around"}, "NASA AND ESA", 1, 0),
    ("validate_frequency_capital_words", {"N": 1, "quantifier": "at most"}, "NASA ESA", 0, 0),
    ("validate_end", {"end_phrase": "Bye"}, "so Bye", 1, 1),
    ("validate_end", {"end_phrase": "Bye"}, "so bye", 1, 0),
    ("validate_quotation", {}, '"a"', 1, 1),
    ("validate_quotation", {}, '"', 0, 1),
    ("validate_no_commas", {}, "a b", 1, 1),
    ("validate_no_commas", {}, "a, b", 0, 0),
]
ARGUMENTS = sorted({name for _, arguments, *_ in ROWS for name in arguments})


def test_every_function_is_tried_both_ways():
    assert {row[0] for row in ROWS} == set(FUNCTIONS) == set(COMPAT) and len(FUNCTIONS) == 25


@pytest.mark.parametrize(("name", "arguments", "response", "fixed", "compat"), ROWS)
def test_function(name, arguments, response, fixed, compat):
    truth = {"func_name": name, **dict.fromkeys(ARGUMENTS), **arguments}  # as in the data: unused arguments are null
    record = {"dataset": "ifeval", "ground_truth": truth}
    assert verify(record, response, "fixed").score == fixed
    assert verify(record, response, "tulu3-compat").score == compat


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("verify_letter_frequency", {"letter": "ab", "N": 1}, "letter is 'ab', need a single letter"),
        ("validate_word_constraint", {"N": 1, "quantifier": "exactly"}, "need 'at least' or 'around' or 'at most'"),
        ("validate_choice", {"options": "yes/no"}, "need a list of texts"),
        ("validate_sections", {"N": 1}, "section_splitter"),
    ],
)
def test_arguments_that_a_function_cannot_use_are_refused(name, arguments, words):
    for rules in ("fixed", "tulu3-compat"):
        with pytest.raises(ValueError, match=words):
            check_record({"dataset": "ifeval", "ground_truth": {"func_name": name, **arguments}}, rules)
