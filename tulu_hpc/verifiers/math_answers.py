"""Final answers in solutions of competition problems: boxed, in a sentence ("final answer is"), or the last formula."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_SENTENCE = re.compile(r"final\s+answer\s+is\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.?\s*i\s+hope\s+it\s+is\s+correct|\n|\.(?=\s|$)", re.IGNORECASE)
_FORMULA = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)


def matching_brace(text: str, start: int) -> int | None:
    """Position of the brace that closes the one at `start`; escaped braces do not count. None if it stays open."""
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """The closing brace of every opening one that has one; escaped braces do not count."""
    pairs: dict[int, int] = {}
    open_braces: list[int] = []
    for mark in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if mark[0] == "{":
            open_braces.append(mark.start())
        elif mark[0] == "}" and open_braces:
            pairs[open_braces.pop()] = mark.start()
    return pairs


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}`, or what follows `\boxed ` up to `$` or the line."""
    closing = _closing_braces(text)
    for box in reversed(list(_BOX.finditer(text))):
        if text[box.end() : box.end() + 1] != "{":
            bare = re.match(r"[^$\n]*", text[box.end() :])
            if bare and bare[0].strip() and box[0][-1].isspace():
                return bare[0].strip()
        elif (end := closing.get(box.end())) is not None:
            return text[box.end() + 1 : end].strip()
    return None


def last_sentence_answer(text: str) -> str | None:
    """What follows the last "final answer is", up to the end of the sentence or of the line."""
    found = list(_SENTENCE.finditer(text))
    if not found:
        return None
    tail = text[found[-1].end() :]
    formula = _FORMULA.match(tail)
    if formula:
        return _content(formula)
    end = _SENTENCE_END.search(tail)
    return tail[: end.start() if end else len(tail)].strip() or None


def last_formula(text: str) -> str | None:
    r"""Content of the last `$...$`, `$$...$$`, `\(...\)` or `\[...\]`."""
    found = list(_FORMULA.finditer(text))
    return _content(found[-1]) if found else None


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def final_answer(text: str) -> str | None:
    """The answer of a solution: what is boxed, else what the closing sentence names, else the last formula."""
    for find in (last_boxed, last_sentence_answer, last_formula):
        if (answer := find(text)) is not None:
            return answer
    return None
