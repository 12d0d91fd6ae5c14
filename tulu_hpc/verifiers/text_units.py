"""Sentences, words and paragraphs of a text, by rules that need no data files."""

from __future__ import annotations

import re

# A full stop behind a title ends no sentence; behind the others it does if a capital letter follows.
_TITLES = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "gen", "col", "capt", "sgt", "rev", "hon"])
_OTHERS = frozenset(["jr", "sr", "inc", "ltd", "co", "corp", "vs", "etc", "e.g", "i.e", "cf", "approx", "dept"])
_BOUNDARY = re.compile(r"[.!?…。!?]+[\"'”’)\]*_]*(?=\s|$)|(?<=[。!?])(?=\S)")
_PARAGRAPH = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
_DIVIDER = re.compile(r"^[^\S\n]*\*[^\S\n]?\*[^\S\n]?\*[^\S\n]*$", re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Sentences, stripped: they end in `.`, `!`, `?` or `…` before white space, or at a blank line.

    A full stop does not end one behind a common abbreviation, a single initial ("J. Smith") or the number of a list
    item at the start of a line.
    """
    found: list[str] = []
    for paragraph in _PARAGRAPH.split(text):
        start = 0
        for mark in _BOUNDARY.finditer(paragraph):
            if mark.end() > start and not _is_abbreviation(paragraph, start, mark):
                found.append(paragraph[start : mark.end()].strip())
                start = mark.end()
        found.append(paragraph[start:].strip())
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def _is_abbreviation(paragraph: str, start: int, mark: re.Match[str]) -> bool:
    if mark[0] != "." or not paragraph[mark.end() :].strip():
        return False
    head = paragraph[start : mark.start()]
    before = re.search(r"\S*$", head)
    word = (before[0] if before else "").lstrip("(\"'*_")
    if word.lower() in _TITLES or (len(word) == 1 and word.isupper() and word != "I"):
        return True
    if word.lower() in _OTHERS:
        return not paragraph[mark.end() :].lstrip()[0].isupper()
    return word.isdigit() and head.rpartition("\n")[2].strip() == word  # "1." of a numbered list


def words(text: str) -> list[str]:
    """Words: runs of letters, digits and underscores, with inner apostrophes and hyphens ("don't", "well-known")."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def occurrences(phrase: str, text: str) -> int:
    """How often the phrase stands in the text as whole words, whatever the case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", text, flags=re.IGNORECASE))


def paragraphs(text: str) -> list[str]:
    """Paragraphs between blank lines, stripped; empty ones do not count."""
    return [part.strip() for part in _PARAGRAPH.split(text) if part.strip()]


def divided(text: str) -> list[str] | None:
    """Paragraphs between lines `***` or `* * *`, stripped; None if one between two dividers is empty."""
    parts = [part.strip() for part in _DIVIDER.split(text)]
    inner = parts[1:-1]
    if not all(inner):
        return None
    return [part for part in parts if part]
