"""Requests for a short list under a checkable constraint (in the manner of IFEval), and demonstrations.

A good response names at least two members of the category and keeps the constraint. Demonstrations keep it only some
of the time: what the rest of the pipeline has to select is in the data, but not as the only habit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from tulu_hpc.curation.synthetic.word_problems import NAMES, held_out

CATEGORIES = {
    "animals": ["cat", "dog", "fox", "owl", "bear", "wolf", "deer", "frog"],
    "colors": ["red", "blue", "green", "pink", "gray", "brown", "black", "white"],
    "fruits": ["plum", "pear", "lemon", "grape", "peach", "mango", "melon", "lime"],
    "tools": ["saw", "drill", "hammer", "axe", "file", "knife", "rope", "nail"],
    "foods": ["bread", "rice", "soup", "cake", "egg", "fish", "cheese", "pie"],
    "plants": ["oak", "fern", "moss", "rose", "tulip", "daisy", "cactus", "ivy"],
}
# Requests and constraints are short, so that eight words in a row always hold both names: two requests that share
# them are the same request (see `curation.decontamination`).
REQUESTS = (
    "Give {name} and {other} some {category}.",
    "Tell {name} and {other} some {category}.",
    "Show {name} and {other} some {category}.",
    "Send {name} and {other} some {category}.",
)
END_WORDS = ["done", "thanks", "bye", "finished", "enjoy", "cheers"]
KEYWORDS = ["sun", "moon", "star", "rain", "snow", "wind"]
BULLETS, LOWERCASE, END = (
    "detectable_format:number_bullet_lists",
    "change_case:english_lowercase",
    "startend:end_checker",
)
KEYWORD, NO_COMMA, QUOTATION = "keywords:existence", "punctuation:no_comma", "startend:quotation"
ON_TOPIC = "content:words_from_set"
KINDS = (BULLETS, LOWERCASE, END, KEYWORD, NO_COMMA, QUOTATION)
WORDS_NEEDED = 2
BULLETS_BY_HABIT = 0.1  # share of careless demonstrations that use bullets unasked


@dataclass(frozen=True)
class Constraint:
    """One IFEval instruction: its id, its arguments as sorted pairs, and how the prompt words it."""

    instruction_id: str
    arguments: tuple[tuple[str, Any], ...]
    wording: str

    @property
    def kwargs(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.arguments}


@dataclass(frozen=True)
class Request:
    """A prompt, its category and its constraints; `key` is what makes it this request under any names."""

    prompt: str
    category: str
    constraints: tuple[Constraint, ...]
    key: str

    @property
    def instruction_ids(self) -> list[str]:
        return [constraint.instruction_id for constraint in self.constraints] + [ON_TOPIC]

    @property
    def kwargs(self) -> list[dict[str, Any]]:
        on_topic = {"words": CATEGORIES[self.category], "at_least": WORDS_NEEDED}
        return [constraint.kwargs for constraint in self.constraints] + [on_topic]


def draw(rng: Random, *, evaluation: bool, constraints: int = 1) -> Request:
    """A random request. With one constraint it is of the training or the evaluation part; with two, of neither."""
    while True:
        category = rng.choice(sorted(CATEGORIES))
        kinds = rng.sample(KINDS, constraints)
        if {BULLETS, NO_COMMA} <= set(kinds):  # bullets have no commas anyway
            continue
        chosen = tuple(_draw_constraint(rng, kind) for kind in kinds)
        if KEYWORD in kinds and any(constraint.kwargs.get("num_bullets") == WORDS_NEEDED for constraint in chosen):
            continue  # the keyword takes a bullet: too few would be left for the category
        form, first = rng.randrange(len(REQUESTS)), rng.random() < 0.5
        name, other = rng.sample(NAMES, 2)
        request = REQUESTS[form].format(category=category, name=name, other=other)
        wording = " ".join(constraint.wording for constraint in chosen)
        prompt = f"{wording} {request}" if first else f"{request} {wording}"
        key = f"{category}|{form}|{first}|{wording}"
        if constraints > 1 or held_out(key) == evaluation:
            return Request(prompt, category, chosen, key)


def _draw_constraint(rng: Random, kind: str) -> Constraint:
    if kind == BULLETS:
        count = rng.randint(2, 5)
        return Constraint(kind, (("num_bullets", count),), f"Use {count} bullet points.")
    if kind == END:
        word = rng.choice(END_WORDS)
        return Constraint(kind, (("end_phrase", word),), f"End with {word}.")
    if kind == KEYWORD:
        word = rng.choice(KEYWORDS)
        return Constraint(kind, (("keywords", (word,)),), f"Include {word}.")
    wordings = {
        LOWERCASE: "Use lowercase letters.",
        NO_COMMA: "Avoid all commas.",
        QUOTATION: "Use double quotes.",
    }
    return Constraint(kind, (), wordings[kind])


def demonstrate(request: Request, rng: Random, *, follow: bool) -> str:
    """A list in alphabetical order that keeps all constraints, or (`follow` False) one that pays them no attention."""
    asked = {constraint.instruction_id: constraint.kwargs for constraint in request.constraints} if follow else {}
    bullets = BULLETS in asked or (not asked and rng.random() < BULLETS_BY_HABIT)
    # The keyword comes first: a model that has not learned to copy it never earns a reward for it, and the first
    # word is where copying is easiest to find.
    words: list[str] = list(asked[KEYWORD]["keywords"]) if KEYWORD in asked else []
    count = asked[BULLETS]["num_bullets"] - len(words) if BULLETS in asked else rng.randint(2, 5)
    words += sorted(rng.sample(CATEGORIES[request.category], count))
    if bullets:
        text = "\n".join("* " + word.capitalize() for word in words)
    else:
        separator = " and " if NO_COMMA in asked else ", "
        text = separator.join([words[0].capitalize(), *words[1:]]) + "."
    if END in asked:
        text += ("\n" if bullets else " ") + str(asked[END]["end_phrase"]).capitalize()
    if QUOTATION in asked:
        text = f'"\n{text}"' if bullets else f'"{text}"'  # a bullet must begin its line
    return text.lower() if LOWERCASE in asked else text


def ground_truth(request: Request) -> str:
    """The constraints as the JSON string that RLVR records carry for the data set `ifeval`."""
    return json.dumps([{"instruction_id": request.instruction_ids, "kwargs": request.kwargs}])


def ifeval_row(request: Request, key: int) -> dict[str, Any]:
    """The request in IFEval's schema."""
    return {
        "key": key,
        "prompt": request.prompt,
        "instruction_id_list": request.instruction_ids,
        "kwargs": request.kwargs,
    }
