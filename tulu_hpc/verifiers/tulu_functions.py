"""The 25 constraint functions of the Tulu 3 data: what each asks for (`fixed`), and what the paper's code checked.

A record names one function and its arguments. In `fixed` it becomes an instruction of `constraints`: IFEval's where the
two ask for the same, one of the `tulu:*` instructions below where they do not (exact counts, "around").
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from tulu_hpc.verifiers.constraints import Letter, Quantifier, constraint, response_language
from tulu_hpc.verifiers.text_units import divided, occurrences, sentences

# The function -> (instruction id, its argument name -> ours).
FUNCTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "verify_keywords": ("keywords:existence", {"keyword_list": "keywords"}),
    "verify_keyword_frequency": ("tulu:keyword_count", {"word": "word", "N": "N"}),
    "validate_forbidden_words": ("keywords:forbidden_words", {"forbidden_words": "forbidden_words"}),
    "verify_letter_frequency": ("tulu:letter_count", {"letter": "letter", "N": "N"}),
    "validate_response_language": ("language:response_language", {"language": "language"}),
    "verify_paragraph_count": ("tulu:divided_paragraphs", {"N": "N"}),
    "validate_word_constraint": ("tulu:word_count", {"N": "N", "quantifier": "quantifier"}),
    "verify_sentence_constraint": ("tulu:sentence_count", {"N": "N", "quantifier": "quantifier"}),
    "validate_paragraphs": (
        "length_constraints:nth_paragraph_first_word",
        {"N": "num_paragraphs", "i": "nth_paragraph", "first_word": "first_word"},
    ),
    "verify_postscript": ("tulu:postscript", {"postscript_marker": "postscript_marker"}),
    "validate_placeholders": ("detectable_content:number_placeholders", {"N": "num_placeholders"}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"N": "num_bullets"}),
    "validate_title": ("detectable_format:title", {}),
    "validate_choice": ("tulu:choice", {"options": "options"}),
    "validate_highlighted_sections": ("detectable_format:number_highlighted_sections", {"N": "num_highlights"}),
    "validate_sections": ("tulu:sections", {"N": "N", "section_splitter": "section_splitter"}),
    "validate_json_format": ("detectable_format:json_format", {}),
    "validate_repeat_prompt": ("combination:repeat_prompt", {"original_prompt": "prompt_to_repeat"}),
    "validate_two_responses": ("combination:two_responses", {}),
    "validate_uppercase": ("change_case:english_capital", {}),
    "validate_lowercase": ("change_case:english_lowercase", {}),
    "validate_frequency_capital_words": ("tulu:capital_words", {"N": "N", "quantifier": "quantifier"}),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}),
    "validate_quotation": ("startend:quotation", {}),
    "validate_no_commas": ("punctuation:no_comma", {}),
}


def _within(count: int, bound: int, quantifier: str, slack: int) -> bool:
    if quantifier == "around":
        return abs(count - bound) <= slack
    return count >= bound if quantifier == "at least" else quantifier == "at most" and count <= bound


def _tenth(bound: int) -> int:
    return max(round(bound * 0.1), 1)


@constraint("tulu:keyword_count")
def keyword_count(response: str, *, word: str, N: int) -> bool:
    """The word or phrase exactly so many times, whole and whatever the case."""
    return occurrences(word, response) == N


@constraint("tulu:letter_count")
def letter_count(response: str, *, letter: Letter, N: int) -> bool:
    """The letter exactly so many times, whatever the case."""
    return response.lower().count(letter.strip().lower()) == N


@constraint("tulu:divided_paragraphs")
def divided_paragraphs(response: str, *, N: int) -> bool:
    """Exactly so many paragraphs between lines `* * *` or `***`."""
    parts = divided(response)
    return parts is not None and len(parts) == N


@constraint("tulu:word_count")
def word_count(response: str, *, N: int, quantifier: Quantifier) -> bool:
    """At least, at most or around (10 %, at least 1) so many words between white space that have a letter or digit."""
    return _within(sum(bool(re.search(r"\w", word)) for word in response.split()), N, quantifier, _tenth(N))


@constraint("tulu:sentence_count")
def sentence_count(response: str, *, N: int, quantifier: Quantifier) -> bool:
    """At least, at most or around (1) so many sentences."""
    return _within(len(sentences(response)), N, quantifier, 1)


@constraint("tulu:postscript")
def postscript(response: str, *, postscript_marker: str) -> bool:
    """The marker stands at the start of a line, and text follows it."""
    return re.search(rf"^\W*{re.escape(postscript_marker.strip())}\W*\w", response, flags=re.MULTILINE) is not None


@constraint("tulu:choice")
def choice(response: str, *, options: Sequence[str]) -> bool:
    """Is one of the options; case, outer quotes, asterisks and a full stop at the end do not count."""

    def bare(text: str) -> str:
        return text.strip().strip("\"'*").strip().rstrip(".").lower()

    return bare(response) in map(bare, options)


@constraint("tulu:sections")
def sections(response: str, *, N: int, section_splitter: str) -> bool:
    """Exactly so many lines that start with the splitter, Markdown marks aside."""
    return len(re.findall(rf"^[\s#*]*{re.escape(section_splitter.strip())}(?!\w)", response, re.MULTILINE)) == N


@constraint("tulu:capital_words")
def capital_words(response: str, *, N: int, quantifier: Quantifier) -> bool:
    """At least, at most or around (10 %, at least 1) so many words of two or more letters, all capitals."""
    return _within(len(re.findall(r"\b[A-Z]{2,}\b", response)), N, quantifier, _tenth(N))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _compat_paragraph_count(text: str, N: int) -> bool:
    parts = "\n".join(line.strip() for line in text.splitlines()).strip().split("* * *")
    return all(part.strip() for part in parts) and len(parts) == N


def _compat_sentences(text: str, N: int, quantifier: str) -> bool:
    # An exclamation mark ends no sentence here.
    return _within(len(re.split(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s", text)), N, quantifier, 1)


def _compat_nth_paragraph(text: str, N: int, first_word: str, i: int) -> bool:
    parts = text.split("\n\n")
    return len(parts) == N >= i and parts[i - 1].strip().startswith(first_word)


def _compat_postscript(text: str, postscript_marker: str) -> bool:
    start = text.find(postscript_marker)
    return start >= 0 and len(text[start:].strip()) > len(postscript_marker)


def _compat_sections(text: str, N: int, section_splitter: str) -> bool:
    parts = text.split(section_splitter)
    return len(parts) - (parts[0] == "") == N


def _compat_two_responses(text: str) -> bool:
    parts = text.split("******")
    return len(parts) == 2 and parts[0].strip() != parts[1].strip()


# What the paper's code did, under its own argument names.
COMPAT: dict[str, Callable[..., bool]] = {
    "verify_keywords": lambda text, keyword_list: all(word.lower() in text.lower() for word in keyword_list),
    "verify_keyword_frequency": lambda text, word, N: re.findall(r"\b\w+\b", text.lower()).count(word.lower()) == N,
    "validate_forbidden_words": lambda text, forbidden_words: (
        not any(w.lower() in text.lower() for w in forbidden_words)
    ),
    "verify_letter_frequency": lambda text, letter, N: text.count(letter) == N,
    "validate_response_language": response_language,
    "verify_paragraph_count": _compat_paragraph_count,
    "validate_word_constraint": lambda text, N, quantifier: _within(len(text.split()), N, quantifier, _tenth(N)),
    "verify_sentence_constraint": _compat_sentences,
    "validate_paragraphs": _compat_nth_paragraph,
    "verify_postscript": _compat_postscript,
    "validate_placeholders": lambda text, N: True,  # it returned a pair, which is always true
    "verify_bullet_points": lambda text, N: sum(line.strip().startswith(("*", "-")) for line in text.split("\n")) == N,
    "validate_title": lambda text: re.search(r"<<(.*?)>>", text) is not None,
    "validate_choice": lambda text, options: any(text in option for option in options),
    "validate_highlighted_sections": lambda text, N: len(re.findall(r"\*(.*?)\*", text)) >= N,
    "validate_sections": _compat_sections,
    "validate_json_format": _is_json,
    "validate_repeat_prompt": lambda text, original_prompt: text.startswith(original_prompt),
    "validate_two_responses": _compat_two_responses,
    "validate_uppercase": lambda text: text == text.upper(),
    "validate_lowercase": lambda text: text == text.lower(),
    "validate_frequency_capital_words": lambda text, N, quantifier: _within(
        len(re.findall(r"\b[A-Z]+\b", text)), N, quantifier, 0
    ),
    "validate_end": lambda text, end_phrase: text.endswith(end_phrase),
    "validate_quotation": lambda text: text.startswith('"') and text.endswith('"'),
    "validate_no_commas": lambda text: "," not in text,
}
