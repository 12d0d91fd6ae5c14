"""Random responses for IFEval's instructions, made of pieces that the instructions look for, and random arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_TEXT = (
    "sun|Sun|SUN|the moon|a.b|c++| |  |\n|\n\n|***|* * *|******|*a*|**b**|** **|\n* x|\n- y|. |! |? |"
    "<<title>>|<<>>|[name]|P.S. so|p. p. s so|Part 1|Part 2\n|PART 3|My answer is yes.|My answer is maybe.|"
    '"|,|\'|Bye|bye.|Say it.|NASA|{|}|1|```json\n{"a": 1}\n```|'
    "It is a fine day and the birds are singing in the old trees."
)
_PIECES = _TEXT.split("|")

Arguments = dict[str, Callable[[random.Random], dict[str, Any]]]
ARGUMENTS: Arguments = {
    "keywords:existence": lambda r: {"keywords": r.sample(["sun", "moon", "birds", "c++", "a.b"], 2)},
    "keywords:frequency": lambda r: {"keyword": r.choice(["sun", "a.b"]), "frequency": r.randint(1, 3)} | _relation(r),
    "keywords:forbidden_words": lambda r: {"forbidden_words": r.sample(["sun", "moon", "a.b", "day"], 2)},
    "keywords:letter_frequency": lambda r: {
        "letter": r.choice("asnE"),
        "let_frequency": r.randint(1, 6),
        "let_relation": r.choice(["at least", "less than"]),
    },
    "language:response_language": lambda r: {"language": r.choice(["en", "de"])},
    "length_constraints:number_paragraphs": lambda r: {"num_paragraphs": r.randint(1, 3)},
    "length_constraints:number_words": lambda r: {"num_words": r.randint(1, 12)} | _relation(r),
    "length_constraints:nth_paragraph_first_word": lambda r: _nth_paragraph(r),
    "detectable_content:number_placeholders": lambda r: {"num_placeholders": r.randint(1, 2)},
    "detectable_content:postscript": lambda r: {"postscript_marker": r.choice(["P.S.", "P.P.S"])},
    "detectable_format:number_bullet_lists": lambda r: {"num_bullets": r.randint(1, 2)},
    "detectable_format:constrained_response": lambda r: {},
    "detectable_format:number_highlighted_sections": lambda r: {"num_highlights": r.randint(1, 3)},
    "detectable_format:multiple_sections": lambda r: {"section_spliter": "Part", "num_sections": r.randint(1, 2)},
    "detectable_format:json_format": lambda r: {},
    "detectable_format:title": lambda r: {},
    "combination:two_responses": lambda r: {},
    "combination:repeat_prompt": lambda r: {"prompt_to_repeat": "Say it."},
    "startend:end_checker": lambda r: {"end_phrase": r.choice(["bye", "Say it."])},
    "startend:quotation": lambda r: {},
    "change_case:english_capital": lambda r: {},
    "change_case:english_lowercase": lambda r: {},
    "punctuation:no_comma": lambda r: {},
}


def _relation(rng: random.Random) -> dict[str, str]:
    return {"relation": rng.choice(["at least", "less than"])}


def _nth_paragraph(rng: random.Random) -> dict[str, Any]:
    count = rng.randint(1, 3)
    return {"num_paragraphs": count, "nth_paragraph": rng.randint(1, count), "first_word": rng.choice(["sun", "say"])}


def responses(rng: random.Random) -> str:
    """One response; sometimes wholly in one case or in quotes, so that every instruction is now and then followed."""
    text = "".join(rng.choice(_PIECES) for _ in range(rng.randint(1, 9)))
    kind = rng.random()
    if kind < 0.1:
        return text.upper()
    if kind < 0.2:
        return text.lower()
    if kind < 0.3:
        return f'"{text}"'
    if kind < 0.35:
        return "Say it. " + text
    return '{"a": 1}' if kind < 0.37 else text
