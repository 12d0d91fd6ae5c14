"""Grade-school math: the last number of the answer against the ground truth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tulu_hpc.verifiers.registry import Verdict, register

_DIGIT_COMMA = re.compile(r"(\d),(\d)")
_COMPAT_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
# A sign counts unless it stands right behind an operand: "12-5" ends in 5, "it is -5" in -5.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+])?(?:\d+(?:\.\d+)?|\.\d+)")
# A ground truth as a whole; commas stand before groups of three digits only. Decimal itself takes "nan" and "1_0".
_TRUTH = re.compile(r"\$?([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?)", re.ASCII)


def last_number(text: str) -> Decimal | None:
    """The last number of a text; thousands separators and dollar signs are dropped, a sign is kept."""
    found = _NUMBER.findall(_strip_separators(text).replace("$", ""))
    return Decimal(found[-1]) if found else None


def reference_answer(answer: str) -> str:
    """The final answer of a GSM8K solution: what follows `####`.

    Raises:
        ValueError: without the marker, or with something behind it that is no number.
    """
    _, marker, tail = answer.rpartition("####")
    if not marker:
        raise ValueError(f"a GSM8K answer must end in '#### <number>', got {answer!r:.100}")
    return str(_number(tail.strip()))


def shows_working(completion: str) -> bool:
    """Whether an answer shows at least one calculation (an equals sign), rather than stating the result only."""
    return "=" in completion


def _strip_separators(text: str) -> str:
    return _DIGIT_COMMA.sub(r"\1\2", text)


def _number(truth: Any) -> Decimal:
    _require_truth(truth)
    found = _TRUTH.fullmatch(str(truth).strip())
    if found is None:
        raise ValueError(f"gsm8k: ground truth {truth!r:.100} is not a number")
    return Decimal(found[1].replace(",", ""))


def _require_truth(truth: Any) -> None:
    if truth is None:
        raise ValueError("gsm8k: the ground truth is null")


def _check(truth: Any) -> None:
    _number(truth)


@register("gsm8k", rules=["fixed"], check=_check)
def verify_gsm8k(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """Numeric equality of the last number and the ground truth: 7 = 7.0, 1,000 = 1000, -5 is not 5."""
    wanted, given = _number(truth), last_number(completion)
    if given is None:
        return Verdict(0.0, "no number in the answer")
    return Verdict(float(given == wanted), f"answer {given}, expected {wanted}")


@register("gsm8k", rules=["tulu3-compat"], check=_require_truth)
def verify_gsm8k_compat(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The rule of the paper's code: string equality with the last match of `[-+]?\\d*\\.\\d+|\\d+`.

    Its effects are kept: an integer loses its sign, 7.0 is not 7, an answer without a number is compared as a whole.
    """
    _require_truth(truth)
    found = _COMPAT_NUMBER.findall(_strip_separators(completion.strip()))
    given = found[-1] if found else completion.strip()
    return Verdict(float(given.lower() == str(truth).lower()), f"answer {given!r:.60}, expected {truth}")
