"""Answers compared as strings (`exact`, `substring`, `f1`, `flan`), lengths (`length`) and shapes (`format`)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tulu_hpc.verifiers.registry import Verdict, register
from tulu_hpc.verifiers.text_units import paragraphs, sentences, words

_UNITS = {"characters": len, "words": lambda text: len(words(text)), "sentences": lambda text: len(sentences(text))}
_UNITS["paragraphs"] = lambda text: len(paragraphs(text))
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANSWER_IS = re.compile(r"the answer is\s*:?", re.IGNORECASE)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space (SQuAD, Rajpurkar et al. 2016)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(given: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the normalised words, counted with multiplicity (SQuAD)."""
    a, b = normalised(given).split(), normalised(truth).split()
    common = sum((Counter(a) & Counter(b)).values())
    if not a or not b:
        return float(a == b)
    return 2 * common / (len(a) + len(b))


def _aliases(name: str, truth: Any) -> list[str]:
    found = [truth] if isinstance(truth, str | int | float) and not isinstance(truth, bool) else truth
    if not isinstance(found, list | tuple) or not found or not all(isinstance(x, str | int | float) for x in found):
        raise ValueError(f"{name}: the ground truth must be a text or a list of accepted texts, got {truth!r:.100}")
    aliases = [str(alias) for alias in found]
    if not all(normalised(alias) for alias in aliases):
        raise ValueError(f"{name}: an accepted text is empty once punctuation and articles are gone: {aliases!r:.100}")
    return aliases


def _alias_check(name: str) -> Any:
    def check(truth: Any) -> None:
        _aliases(name, truth)

    return check


@register("exact", check=_alias_check("exact"))
def verify_exact(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The whole answer is one of the accepted texts, after normalisation."""
    good = normalised(completion) in map(normalised, _aliases("exact", truth))
    return Verdict(float(good), "equal" if good else f"answer {completion.strip()!r:.60}")


@register("substring", check=_alias_check("substring"))
def verify_substring(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The answer contains one of the accepted texts as whole words, after normalisation."""
    text = f" {normalised(completion)} "
    found = next((alias for alias in _aliases("substring", truth) if f" {normalised(alias)} " in text), None)
    return Verdict(float(found is not None), "not found" if found is None else f"contains {found!r:.60}")


@register("f1", check=_alias_check("f1"))
def verify_f1(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The best word F1 over the accepted texts."""
    best = max(token_f1(completion, alias) for alias in _aliases("f1", truth))
    return Verdict(best, f"F1 {best:.3f}", {"exact": float(best == 1.0)})


@register("flan", rules=["fixed"], check=_alias_check("flan"))
def verify_flan(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """What follows the last "the answer is" (any case, colon or not; else the whole answer), compared as `exact`."""
    return verify_exact(_ANSWER_IS.split(completion)[-1], truth, record)


@register("flan", rules=["tulu3-compat"], check=_alias_check("flan"))
def verify_flan_compat(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """What follows the last "The answer is: ", exactly so written (else the whole answer), compared as `exact`."""
    return verify_exact(completion.split("The answer is: ")[-1], truth, record)


def _bounds(truth: Any) -> tuple[str, int, float]:
    if not isinstance(truth, Mapping) or not set(truth) <= {"unit", "min", "max"} or not {"min", "max"} & set(truth):
        raise ValueError(f"length: the ground truth must hold min, max or both, and unit, got {truth!r:.100}")
    unit, low, high = truth.get("unit", "words"), truth.get("min") or 0, truth.get("max")
    if not isinstance(unit, str) or unit not in _UNITS:
        raise ValueError(f"length: unknown unit {unit!r:.60}; known: {', '.join(sorted(_UNITS))}")
    counts = [low] if high is None else [low, high]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts) or counts != sorted(counts):
        raise ValueError(f"length: min and max must be counts with min <= max, got {truth!r:.100}")
    return unit, low, float("inf") if high is None else high


def _check_bounds(truth: Any) -> None:
    _bounds(truth)


@register("length", check=_check_bounds)
def verify_length(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """Between `min` and `max`, both inclusive, `unit`s: characters, words (the default), sentences or paragraphs."""
    unit, low, high = _bounds(truth)
    count = _UNITS[unit](completion.strip())
    return Verdict(float(low <= count <= high), f"{count} {unit}", {unit: float(count)})


def _patterns(truth: Any) -> Sequence[re.Pattern[str]]:
    texts = [truth] if isinstance(truth, str) else truth
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"format: the ground truth must be a regular expression or a list of them, got {truth!r:.100}")
    try:
        return [re.compile(text, re.DOTALL) for text in texts]
    except re.error as error:
        raise ValueError(f"format: not a regular expression ({error}): {truth!r:.100}") from None


def _check_patterns(truth: Any) -> None:
    _patterns(truth)


@register("format", check=_check_patterns)
def verify_format(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The whole answer, stripped, matches every regular expression (`.` also matches line ends)."""
    missed = [pattern.pattern for pattern in _patterns(truth) if pattern.fullmatch(completion.strip()) is None]
    return Verdict(float(not missed), f"does not match {missed[0]!r:.100}" if missed else "matches")
