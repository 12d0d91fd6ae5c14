"""Checks of single instructions, named and parametrised as in IFEval (Zhou et al. 2023, arXiv:2311.07911).

Each check takes the response and the keyword arguments of its record and says whether the instruction was followed.
IFEval also asks a language detector whether text in one case is English; that part is left out here (the detector calls
short texts any language), so `change_case:*` looks at the case alone.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NewType, get_args, get_type_hints

Relation = Literal["at least", "less than"]
Quantifier = Literal["at least", "around", "at most"]
Letter = NewType("Letter", str)  # one character
Constraint = Callable[..., bool]
CONSTRAINTS: dict[str, Constraint] = {}


def constraint(instruction_id: str) -> Callable[[Constraint], Constraint]:
    """Decorator: register a check under its instruction id."""

    def add(check: Constraint) -> Constraint:
        CONSTRAINTS[instruction_id] = check
        return check

    return add


def check_arguments(instruction_id: str, kwargs: dict[str, Any]) -> None:
    """Refuse an unknown instruction, or arguments that its check does not take or could not use.

    The check's annotations say what fits: `int` is a count, `str` a text that is not blank, `Sequence[str]` a list of
    at least one of these, `Literal` one of its words, `Letter` a single character.

    Raises:
        ValueError: naming the instruction and the argument.
    """
    if instruction_id == "language:response_language":
        _detect_language("")  # says at once, not at the first verdict, that the detector is missing
    if instruction_id not in CONSTRAINTS:
        raise ValueError(f"ifeval: unknown instruction {instruction_id!r}; known: {', '.join(sorted(CONSTRAINTS))}")
    signature, types = _signature(instruction_id)
    try:
        signature.bind("", **kwargs)
    except TypeError as error:
        raise ValueError(f"ifeval: instruction {instruction_id!r}: {error}") from None
    for name, value in kwargs.items():
        if need := _misfit(value, types.get(name)):
            raise ValueError(f"ifeval: instruction {instruction_id!r}: {name} is {value!r:.100}, need {need}")


@cache
def _signature(instruction_id: str) -> tuple[inspect.Signature, dict[str, Any]]:
    check = CONSTRAINTS[instruction_id]
    return inspect.signature(check), get_type_hints(check)


def _misfit(value: Any, kind: Any) -> str | None:
    """What is needed instead of the value, None where it fits."""
    if kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if fits else "a count"
    if kind is Letter:
        return None if _is_phrase(value) and len(value.strip()) == 1 else "a single letter"
    if kind is str:
        return None if _is_phrase(value) else "a text that is not blank"
    if kind == Sequence[str]:
        fits = isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_phrase, value))
        return None if fits else "a list of texts that are not blank, at least one"
    if kind == str | Sequence[str]:
        return _misfit(value, str if isinstance(value, str) else Sequence[str])
    if kind in (Relation, Quantifier):
        return None if value in get_args(kind) else " or ".join(map(repr, get_args(kind)))
    return None


def _is_phrase(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def in_relation(count: int, bound: int, relation: Relation) -> bool:
    """Whether a count keeps to its bound."""
    return count >= bound if relation == "at least" else count < bound


@constraint("detectable_format:number_bullet_lists")
def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that start with `*` (but not `**`) or `-`."""
    stars = re.findall(r"^\s*\*[^\*].*$", response, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, flags=re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@constraint("change_case:english_lowercase")
def english_lowercase(response: str) -> bool:
    """Has letters, none of them a capital."""
    return response.islower()


@constraint("change_case:english_capital")
def english_capital(response: str) -> bool:
    """Has letters, all of them capitals."""
    return response.isupper()


@constraint("startend:end_checker")
def end_checker(response: str, *, end_phrase: str) -> bool:
    """Ends in the phrase, whatever the case; white space and double quotes around the response do not count."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@constraint("startend:quotation")
def quotation(response: str) -> bool:
    """Starts and ends with a double quotation mark."""
    text = response.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


@constraint("keywords:existence")
def keywords_existence(response: str, *, keywords: Sequence[str]) -> bool:
    """Contains every keyword, whatever the case, inside a longer word too."""
    return all(re.search(re.escape(keyword), response, flags=re.IGNORECASE) for keyword in keywords)


@constraint("keywords:forbidden_words")
def forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    """Contains none of the words as a whole word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, flags=re.IGNORECASE) for word in forbidden_words)


@constraint("keywords:frequency")
def keyword_frequency(response: str, *, keyword: str, frequency: int, relation: Relation = "at least") -> bool:
    """The keyword occurs at least, or less than, so many times."""
    return in_relation(len(re.findall(re.escape(keyword), response, flags=re.IGNORECASE)), frequency, relation)


@constraint("punctuation:no_comma")
def no_comma(response: str) -> bool:
    """Contains no comma."""
    return "," not in response


@constraint("length_constraints:number_words")
def number_words(response: str, *, num_words: int, relation: Relation = "at least") -> bool:
    """At least, or less than, so many words (runs of word characters)."""
    return in_relation(len(re.findall(r"\w+", response)), num_words, relation)


@constraint("detectable_content:number_placeholders")
def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


@constraint("detectable_format:title")
def title(response: str) -> bool:
    """Has a title in double angle brackets that is not blank."""
    return any(found.strip("<> \t") for found in re.findall(r"<<[^\n]+>>", response))


@constraint("detectable_format:json_format")
def json_format(response: str) -> bool:
    """The whole response is JSON, perhaps in a Markdown fence."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _detect_language(text: str) -> str | None:
    """ISO code of the language, None where there is nothing to detect it by.

    Raises:
        ValueError: langdetect is not installed.
    """
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError:
        raise ValueError(
            "ifeval: instruction 'language:response_language' needs langdetect: pip install 'tulu_hpc[eval]'"
        ) from None
    DetectorFactory.seed = 0  # the detector draws random samples of the text
    try:
        return str(detect(text))
    except LangDetectException:
        return None


@constraint("language:response_language")
def response_language(response: str, *, language: str) -> bool:
    """langdetect names this language (ISO code); a response without letters counts as right, as in IFEval."""
    return _detect_language(response) in (language, None)


@constraint("content:words_from_set")
def words_from_set(response: str, *, words: Sequence[str], at_least: int = 2) -> bool:
    """At least so many different words of the set, whole and in any case.

    Not an IFEval instruction: it keeps an answer on its subject, so that a constraint cannot be met by saying nothing.
    """
    return len({word.lower() for word in words} & set(re.findall(r"\w+", response.lower()))) >= at_least
