"""Verifiers by name, in two rule sets.

`tulu3-compat` scores as the code behind the Tulu 3 paper did, its mistakes included, so that its runs can be repeated;
`fixed` scores what was meant. A record names its verifiers in `dataset` and gives each its `ground_truth`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RULE_SETS = ("fixed", "tulu3-compat")
GRANTS = ("files", "network", "processes")  # what a worker may do beyond reading and computing


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion.

    Attributes:
        score: in [0, 1].
        reason: one line for people.
        metrics: further figures of the same completion, e.g. IFEval's loose score.
    """

    score: float
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


Verifier = Callable[[str, Any, Mapping[str, Any]], Verdict]  # (completion, ground truth, record)
Check = Callable[[Any], None]  # raises ValueError for a ground truth that the verifier cannot use

Prepare = Callable[[], None]


@dataclass(frozen=True)
class Entry:
    """A registered verifier."""

    verifier: Verifier
    check: Check | None
    prepare: Prepare | None
    needs: frozenset[str]


_VERIFIERS: dict[tuple[str, str], Entry] = {}


def register(
    name: str,
    *,
    rules: Sequence[str] = RULE_SETS,
    check: Check | None = None,
    prepare: Prepare | None = None,
    needs: Sequence[str] = (),
) -> Callable[[Verifier], Verifier]:
    """Decorator: make a verifier available under `name` (case does not matter) in the given rule sets.

    Args:
        name: what records give in `dataset`.
        rules: rule sets that it belongs to.
        check: raises ValueError for a ground truth that the verifier cannot use.
        prepare: slow imports; a worker calls it once, before the clock of its first verdict starts.
        needs: grants without which it cannot work, of `GRANTS`.

    Raises:
        ValueError: unknown rule set or grant, or the name is taken.
    """
    require_grants(needs)

    def add(verifier: Verifier) -> Verifier:
        for rule_set in rules:
            _require_rules(rule_set)
            key = (rule_set, name.lower())
            if key in _VERIFIERS:
                raise ValueError(f"verifier {name!r} is already registered in {rule_set!r}")
            _VERIFIERS[key] = Entry(verifier, check, prepare, frozenset(needs))
        return verifier

    return add


def verifier_names(rules: str = "fixed") -> list[str]:
    """Names that records may use in `dataset`."""
    _require_rules(rules)
    return sorted(name for rule_set, name in _VERIFIERS if rule_set == rules)


def check_record(record: Mapping[str, Any], rules: str = "fixed", grants: Collection[str] | None = None) -> None:
    """Refuse a record that cannot be verified, before any time is spent on it.

    Args:
        record: as for `verify`.
        rules: rule set.
        grants: what the workers will be allowed; None to leave that open.

    Raises:
        ValueError: naming the field, the unknown verifier, the missing grant, or what is wrong with the ground truth.
    """
    for name, truth in _tasks_of(record):
        entry = _lookup(name, rules)
        if grants is not None and (missing := sorted(entry.needs - set(grants))):
            raise ValueError(f"verifier {name!r} needs verifier.grants: [{', '.join(missing)}]")
        if entry.check is not None:
            entry.check(truth)


def preparations(record: Mapping[str, Any], rules: str) -> list[Prepare]:
    """What a worker must call before it verifies a record, once per function; nothing for a record that is wrong."""
    try:
        entries = [_lookup(name, rules) for name, _ in _tasks_of(record)]
    except ValueError:  # `verify` says so
        return []
    return [entry.prepare for entry in entries if entry.prepare is not None]


def verify(record: Mapping[str, Any], completion: str, rules: str = "fixed") -> Verdict:
    """Score one completion of a record; with several verifiers the weighted mean of their scores.

    Args:
        record: `dataset` (a name or a list of names) and `ground_truth` (a value, or a list as long as `dataset`);
            further fields are handed to the verifiers. `math*3` is the verifier `math` with weight 3 (1 without); one
            of weight 0 is measured only.
        completion: text of the answer, without prompt and without end-of-text.
        rules: rule set, one of `RULE_SETS`.

    Raises:
        ValueError: as `check_record`, or a verifier gave a score outside [0, 1].
    """
    verdicts: list[tuple[str, Verdict]] = []
    tasks = _tasks_of(record)
    weights = _weights(record["dataset"])
    for name, truth in tasks:
        verdict = _lookup(name, rules).verifier(completion, truth, record)
        if not (math.isfinite(verdict.score) and 0.0 <= verdict.score <= 1.0):
            raise ValueError(f"verifier {name!r} gave the score {verdict.score}, outside [0, 1]")
        verdicts.append((name, verdict))
    if len(verdicts) == 1:
        return verdicts[0][1]
    metrics = {f"{name}/{key}": value for name, verdict in verdicts for key, value in verdict.metrics.items()}
    metrics |= {f"{name}/score": verdict.score for name, verdict in verdicts}
    score = sum(weight * verdict.score for weight, (_, verdict) in zip(weights, verdicts, strict=True)) / sum(weights)
    return Verdict(score, "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts), metrics)


def _tasks_of(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    for key in ("dataset", "ground_truth"):
        if key not in record:
            raise ValueError(f"a record to verify needs the field {key!r}; it has {sorted(record)}")
    names, truths = record["dataset"], record["ground_truth"]
    if isinstance(names, str):
        # One verifier: a list is its own ground truth, unless it only wraps the value.
        wrapped = isinstance(truths, list) and len(truths) == 1
        return [(_name(names), truths[0] if wrapped else truths)]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"field 'dataset' must be a name or a list of names, got {names!r}")
    if not isinstance(truths, list) or len(truths) != len(names):
        raise ValueError(
            f"field 'ground_truth' must be a list as long as 'dataset' ({len(names)}), got {truths!r:.200}"
        )
    _weights(names)
    return list(zip(map(_name, names), truths, strict=True))


def _name(entry: str) -> str:
    return entry.partition("*")[0].strip()


def _weights(entries: str | Sequence[str]) -> list[float]:
    weights = []
    for entry in [entries] if isinstance(entries, str) else entries:
        _, star, text = entry.partition("*")
        try:
            weight = float(text) if star else 1.0
        except ValueError:
            weight = -1.0
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"field 'dataset': the weight of {entry!r} must be a number from 0 on")
        weights.append(weight)
    if not sum(weights):
        raise ValueError(f"field 'dataset': the weights of {entries!r} are all 0")
    return weights


def _lookup(name: str, rules: str) -> Entry:
    _require_rules(rules)
    found = _VERIFIERS.get((rules, name.lower()))
    if found is None:
        raise ValueError(f"unknown verifier {name!r} in rule set {rules!r}; known: {', '.join(verifier_names(rules))}")
    return found


def require_grants(grants: Collection[str]) -> None:
    """Refuse an unknown grant."""
    if unknown := sorted(set(grants) - set(GRANTS)):
        raise ValueError(f"unknown grants {unknown}; known: {', '.join(GRANTS)}")


def _require_rules(rules: str) -> None:
    if rules not in RULE_SETS:
        raise ValueError(f"unknown rule set {rules!r}; known: {', '.join(RULE_SETS)}")
