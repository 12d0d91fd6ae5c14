"""Two published normalisations of final answers as strings, with their quirks.

`hendrycks`: that of the MATH data set (Hendrycks et al. 2021, arXiv:2103.03874). `minerva`: appendix D of Lewkowycz et
al. 2022 (arXiv:2206.14858). The word lists and the order of the steps are theirs; both decide what counts as equal in
published scores, so nothing is repaired here.
"""

from __future__ import annotations

import re

_DELETED_BY_HENDRYCKS = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
_MINERVA_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_MINERVA_WORDS = (
    "square ways integers dollars mph inches ft hours km units \\ldots sue points feet minutes digits cents degrees "
    "cm gm pounds meters meals edges students childrentickets multiples"
)
_MINERVA_DELETED = (
    *_MINERVA_WORDS.split(),
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    '"',
    "\\dots",
)
_MINERVA_UNWRAPPED = (
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
    (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
    (r"(sqrt)([^{])", r"sqrt{\2}"),
)


def minerva(answer: str) -> str:
    """The right side of an equation without units, spaces and wrappers; short fractions and roots get their braces."""
    answer = answer.split("=")[-1]
    for old, new in _MINERVA_REPLACED:
        answer = answer.replace(old, new)
    for word in _MINERVA_DELETED:
        answer = answer.replace(word, "")
    for pattern, replacement in _MINERVA_UNWRAPPED:
        answer = re.sub(pattern, replacement, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


class _Unnormalisable(Exception):
    """The published code fails on such a string and then compares the strings as they are."""


def hendrycks_equal(answer: str, truth: str) -> bool:
    """Equality after normalisation, or of the raw strings where that fails for either."""
    try:
        return _hendrycks(answer) == _hendrycks(truth)
    except _Unnormalisable:
        return answer == truth


def _hendrycks(text: str) -> str:
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for part in _DELETED_BY_HENDRYCKS:
        text = text.replace(part, "")
    text = _without_unit(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "k = 5", "x=5"
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _fraction_of_slash("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise _Unnormalisable
    return parts[0]


def _braced_roots(text: str) -> str:
    head, *tails = text.split("\\sqrt")
    for tail in tails:
        if not tail:
            raise _Unnormalisable
        head += "\\sqrt" + (tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}")
    return head


def _braced_fractions(text: str) -> str:
    head, *tails = text.split("\\frac")
    for tail in tails:
        if not tail:
            raise _Unnormalisable
        if tail[0] != "{":
            if len(tail) < 2:
                return text
            below = tail[1:] if tail[1] == "{" else f"{{{tail[1]}}}{tail[2:]}"
            tail = f"{{{tail[0]}}}{below}"
        head += "\\frac" + tail
    return head


def _fraction_of_slash(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        above, below = int(parts[0]), int(parts[1])
    except ValueError:
        raise _Unnormalisable from None
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
