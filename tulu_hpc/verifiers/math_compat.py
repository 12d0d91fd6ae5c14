"""Final answers as the code behind the paper found and compared them ("flex" exact match).

Every candidate counts: the last box, Minerva's closing sentence, else the last `$...$`, else the whole text. It is
right if its string equals the ground truth's by `hendrycks`, or if sympy's LaTeX parser (antlr) reads both and
`simplify` makes their difference zero.
"""

from __future__ import annotations

import re
from typing import Any

from tulu_hpc.verifiers.math_strings import hendrycks_equal, minerva

_CLOSING = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")


def require_parser() -> None:
    """Import what the comparison needs.

    Raises:
        ValueError: the antlr runtime is missing, or is not the version that sympy's grammar was made for.
    """
    try:
        from sympy.parsing.latex import parse_latex

        parse_latex("1")
    except ImportError:
        raise ValueError(
            "math: rule set 'tulu3-compat' needs antlr4-python3-runtime 4.11: pip install 'tulu_hpc[eval]'"
        ) from None


def candidates(text: str) -> list[str]:
    """What the code compares with the ground truth; at least one string."""
    found = []
    if (boxed := _last_box(text)) is not None:
        found.append(boxed)
    if closing := _CLOSING.search(text + "I hope it is correct."):
        found.append(minerva(closing[1].strip()))
    if found:
        return found
    dollars = [match.start() for match in re.finditer(r"\$", text)]
    if len(dollars) > 1:
        return [minerva(text[dollars[-2] + 1 : dollars[-1]])]
    return [minerva(text)]


def _last_box(text: str) -> str | None:
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        return None  # an \fbox is found and then dropped by the original
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if text[position] == "}" and depth == 0:
            box = text[start : position + 1]
            return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else None
    return None


def equal(text: str, truth: str) -> bool:
    """Whether any candidate of the text is the ground truth."""
    found = candidates(text)
    # All strings first: the same verdict, without waiting for sympy.
    return any(hendrycks_equal(answer, truth) for answer in found) or any(sympy_equal(a, truth) for a in found)


def sympy_equal(answer: str, truth: str) -> bool:
    """Whether sympy reads both and finds no difference. Takes any time: run it where it can be killed."""
    import sympy
    from sympy.parsing.latex import parse_latex

    try:
        difference: Any = parse_latex(answer) - parse_latex(truth)
        return bool(sympy.simplify(difference) == 0)
    except Exception:  # as the original: whatever the parser or simplify raises means "not equal"
        return False
