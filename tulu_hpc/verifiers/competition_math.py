"""Competition mathematics (`math`): the final answer of a solution against the ground truth, in both rule sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulu_hpc.verifiers import math_compat, math_equal
from tulu_hpc.verifiers.math_answers import final_answer
from tulu_hpc.verifiers.registry import Verdict, register


def _text(truth: Any) -> str:
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        raise ValueError(f"math: the ground truth must be the final answer as text or number, got {truth!r:.100}")
    if not str(truth).strip():
        raise ValueError("math: the ground truth is empty")
    return str(truth)


def _check(truth: Any) -> None:
    if not math_equal.cleaned(_text(truth)):
        raise ValueError(f"math: nothing is left of the ground truth {truth!r:.100} without units and signs")


def _check_compat(truth: Any) -> None:
    _text(truth)
    math_compat.require_parser()


@register("math", rules=["fixed"], check=_check, prepare=math_equal.prepare)
def verify_math(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The answer in the last box, else in the closing sentence, else in the last formula means the truth."""
    wanted, given = _text(truth), final_answer(completion)
    if given is None:
        return Verdict(0.0, "no final answer: no box, no closing sentence, no formula")
    return Verdict(float(math_equal.answers_equal(given, wanted)), f"answer {given!r:.60}, expected {wanted!r:.60}")


@register("math", rules=["tulu3-compat"], check=_check_compat, prepare=math_compat.require_parser)
def verify_math_compat(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The rule of the paper's code: any candidate, by string or by sympy; see `math_compat`."""
    wanted = _text(truth)
    return Verdict(float(math_compat.equal(completion, wanted)), f"expected {wanted!r:.60}")
