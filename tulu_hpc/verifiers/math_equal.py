r"""Whether two final answers mean the same: as text, as numbers, or as expressions.

Answers may be lists, tuples, sets, intervals, unions, matrices, equations and inequalities; their parts are compared as
expressions. Two expressions are equal if they have the same value to 25 digits: as they stand where they have no
letters, else at several points of the complex plane. That takes no simplification, so neither luck nor much time; two
different expressions of the kind that `latex` reads agree at all of the points only if they were made for it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from typing import Any

from tulu_hpc.verifiers.latex import MAX_CHARACTERS, LatexError, read_expression
from tulu_hpc.verifiers.math_answers import matching_brace

MAX_PARTS = 64
DIGITS = 40
RELATIVE, ABSOLUTE = 1e-25, 1e-60
_UNIT_NAMES = (
    "cm mm km m ft in inch inches feet foot yard yards mile miles meter meters metre metres centimeters kilometers "
    "second seconds minute minutes hour hours day days week weeks month months year years dollar dollars cent cents "
    "degree degrees unit units square squared cubic percent pound pounds gram grams kg liter liters mph radians "
    "points ways integers students people digits edges sq"
)
_UNIT_WORDS = frozenset(_UNIT_NAMES.split())
_WRAPPERS = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox|boxed|operatorname)\s*(?=\{)")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_PLAIN_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}|([-+]?\d+)/(\d+)")
_RELATIONS = {"\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">="}
_RELATION = re.compile(r"(<=|>=|<|>|=)")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "="}
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^}]*\})?(.*?)\\end\{\1\}", re.DOTALL)
# Points off every axis, so that roots, absolute values and logarithms take different branches; the first are real.
_POINTS = ((7319, 0), (-12873, 0), (29137, 0), (4127, 13391), (-17213, -3877))  # real and imaginary part, in 1/10000


def prepare() -> None:
    """Import sympy, which takes a while."""
    import sympy  # noqa: F401


def answers_equal(given: str, truth: str) -> bool:
    """Whether an answer means the same as the ground truth. Takes any time: run it where it can be killed."""
    given, truth = cleaned(given), cleaned(truth)
    if not given or not truth:
        return False
    if _squeezed(given) == _squeezed(truth):
        return True
    return _equal(_sides_removed(given, truth), _sides_removed(truth, given))


def cleaned(answer: str) -> str:
    """An answer without dollar signs, wrappers of text, spacing commands, units and a full stop at the end."""
    answer = answer.strip().replace("\\$", "").replace("$", "").replace("\u2212", "-")
    answer = re.sub(r"\\[!,;:]|\\q?quad\b|~", " ", answer.replace("{,}", ","))
    answer = re.sub(r"\\(?:left|right)(?![a-zA-Z])\.?", "", answer)
    answer = _without_texts(answer)
    answer = re.sub(r"\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|\\degree\b|°|\\?%", "", answer)
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer) if _grouped(answer) else answer
    return answer.strip().rstrip(".").strip()


def _grouped(answer: str) -> bool:
    """Commas separate thousands: one number, not a list of numbers in brackets."""
    return re.search(r"[(\[{]", answer.replace("\\frac{", "")) is None and (
        re.search(r"\d{1,3}(?:,\d{3})+(?![\d,])", answer) is not None
    )


def _without_texts(answer: str) -> str:
    """Units in wrappers go; other text stays, without its wrapper."""
    while match := _WRAPPERS.search(answer):
        end = matching_brace(answer, match.end())
        if end is None:
            return answer
        inner, rest = answer[match.end() + 1 : end], answer[end + 1 :]
        before = answer[: match.start()].rstrip()
        if before and before[-1] not in ",(=" and _is_unit(inner):
            inner, rest = "", re.sub(r"^\s*\^\s*\{?[23]\}?", "", rest)
        if inner.strip() in ("and", "or"):
            inner = ","
        answer = f"{before} {inner} {rest}" if inner else before + " " + rest
    return _without_unit_words(answer)


def _is_unit(text: str) -> bool:
    parts = re.findall(r"[A-Za-z]+", text)
    return all(part.lower() in _UNIT_WORDS for part in parts) and (bool(parts) or not text.strip())


def _without_unit_words(answer: str) -> str:
    """`5 cm` and `12 square inches` lose their units; a lone word or letter stays."""
    match = re.fullmatch(r"(.*[\d})])\s+((?:[A-Za-z]+\s*)+)(?:\^\{?[23]\}?)?", answer.strip(), re.DOTALL)
    return match[1] if match and _is_unit(match[2]) else answer


def _squeezed(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s+", "", text)
    if re.fullmatch(r"\(?[A-Za-z]\)?", text):  # a choice: (C) is C
        return text.strip("()").lower() if "(" in text else text.lower()
    return text.lower() if re.fullmatch(r"[A-Za-z'-]{2,}", text) else text


def _sides_removed(text: str, other: str) -> str:
    r"""`x = 5` is 5 where the other side names no variable, and `x \in ...` is the set."""
    text = re.sub(r"^\s*[a-zA-Z]\s*\\in\b\s*", "", text)
    sides = text.split("=")
    if len(sides) > 1 and "=" not in other and not re.search(r"[<>]|\\[lg]eq?\b", text):
        return sides[-1].strip()
    return text


def _equal(given: str, truth: str) -> bool:
    for text in (given, truth):
        if _MATRIX.search(text):
            return _equal_matrices(given, truth)
    given, truth = _set_as_list(given), _set_as_list(truth)
    a, b = _alternatives(given), _alternatives(truth)
    if len(a) != len(b) or len(a) > MAX_PARTS:
        return False
    if len(a) > 1:
        return _same_elements(a, b)
    a, b = _split(given, "\\cup"), _split(truth, "\\cup")
    if len(a) > 1 or len(b) > 1:
        return _same_elements(a, b)
    outer_a, inner_a = _bracketed(given)
    outer_b, inner_b = _bracketed(truth)
    parts_a, parts_b = _split(inner_a, ","), _split(inner_b, ",")
    if len(parts_a) > 1 or len(parts_b) > 1:  # both in brackets, or one of them with nothing to match it
        return outer_a == outer_b and len(parts_a) == len(parts_b) and all(map(_equal, parts_a, parts_b))
    return _equal_relations(given, truth)


def _set_as_list(text: str) -> str:
    outer, inner = _bracketed(text)
    return inner if outer == "{}" else text


def _same_elements(a: list[str], b: list[str]) -> bool:
    """The same elements in any order."""
    if len(a) != len(b) or len(a) > MAX_PARTS:
        return False
    rest = list(b)
    for part in a:
        found = next((i for i, other in enumerate(rest) if _equal(part, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _alternatives(text: str) -> list[str]:
    r"""The parts of a list without brackets, `\pm` written out."""
    parts = [text] if _bracketed(text)[0] else _split(text, ",")
    found = []
    for part in parts:
        if "\\pm" in part:
            found += [part.replace("\\pm", "+", 1), part.replace("\\pm", "-", 1)]
        else:
            found.append(part)
    return found


def _bracketed(text: str) -> tuple[str, str]:
    """The outer brackets, "" if none embrace the whole, and what they hold."""
    text = text.strip()
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            inner = text[len(opening) : -len(closing)]
            if _balanced(inner) and (opening == "\\{" or "," in inner):
                return (opening + closing).replace("\\", ""), inner
    return "", text


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators outside all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if depth == 0 and text.startswith(separator, position):
            parts.append(text[start:position])
            position += len(separator)
            start = position
            continue
        depth += (character in "([{") - (character in ")]}")
        position += 1
    return [part.strip() for part in [*parts, text[start:]]]


def _equal_matrices(given: str, truth: str) -> bool:
    tables = []
    for text in (given, truth):
        match = _MATRIX.fullmatch(text.strip())
        if match is None:
            return False
        rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
        tables.append([[cell.strip() for cell in row.split("&")] for row in rows])
    a, b = tables
    return [len(row) for row in a] == [len(row) for row in b] and all(
        _equal(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)
    )


def _equal_relations(given: str, truth: str) -> bool:
    a, b = _relation_parts(given), _relation_parts(truth)
    if len(a) != len(b):
        return False
    if len(a) == 1:
        return expressions_equal(a[0], b[0])
    if a[1::2] == ["="] == b[1::2]:
        return _equal_equations(a[0], a[2], b[0], b[2])
    flipped = [_FLIPPED.get(part, part) for part in reversed(b)]
    return any(a[1::2] == other[1::2] and all(map(expressions_equal, a[::2], other[::2])) for other in (b, flipped))


def _relation_parts(text: str) -> list[str]:
    text = re.sub(r"\\(?:leqslant|geqslant|leq|geq|le|ge|lt|gt)(?![a-zA-Z])", _relation_sign, text)
    return [part.strip() for part in _RELATION.split(text)]


def _relation_sign(match: re.Match[str]) -> str:
    return {"\\lt": "<", "\\gt": ">"}.get(match[0]) or _RELATIONS[match[0]]


def _equal_equations(left: str, right: str, other_left: str, other_right: str) -> bool:
    """The same equation up to its sides and its sign: `x = y`, `y = x`, `x - y = 0`."""
    try:
        a = read_expression(left) - read_expression(right)
        b = read_expression(other_left) - read_expression(other_right)
        return _same_value(a, b) or _same_value(a, -b)
    except (LatexError, OverflowError):
        return False


def expressions_equal(given: str, truth: str) -> bool:
    """Whether two formulas without relation have the same value everywhere; unreadable ones must be the same text."""
    a, b = _plain_number(given), _plain_number(truth)
    if a is not None and b is not None:
        return a == b
    if _squeezed(given) == _squeezed(truth):
        return True
    try:
        return _same_value(read_expression(given), read_expression(truth))
    except (LatexError, OverflowError):  # a value that no floating-point number holds
        return False


def _plain_number(text: str) -> Fraction | None:
    """A decimal or a fraction of whole numbers, without sympy."""
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    if match := _PLAIN_FRACTION.fullmatch(text):
        sign, above, below, left, right = match.groups()
        if int(below or right) == 0:
            return None
        value = Fraction(int(above or left), int(below or right))
        return -value if sign == "-" else value
    return None


@cache
def _points() -> list[Any]:
    from sympy import I, Rational

    return [Rational(real, 10_000) + I * Rational(imaginary, 10_000) for real, imaginary in _POINTS]


def _step(number: int) -> Any:
    """A distance between the values of different letters, so that `x - y` is nowhere zero."""
    from sympy import Rational

    return Rational(number, 101)


def _same_value(a: Any, b: Any) -> bool:
    letters = sorted(a.free_symbols | b.free_symbols, key=str)
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    if a.is_infinite or b.is_infinite:
        return False
    points = _points() if letters else [None]
    compared = 0
    for shift, point in enumerate(points):
        values = {letter: point + _step(i * 37 + shift) for i, letter in enumerate(letters)}
        x, y = (expression.evalf(DIGITS, subs=values) for expression in (a, b))
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            if x != y:
                return False
            continue
        compared += 1
        if abs(x - y) > (abs(x) + abs(y)) * RELATIVE + ABSOLUTE:
            return False
    return compared > 0
