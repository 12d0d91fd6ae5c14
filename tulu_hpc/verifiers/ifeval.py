"""Verifiable instructions: several constraints on one response, scored strictly, loosely, or as Tulu 3's code did.

Ground truths come in two formats, each perhaps as JSON text or wrapped in a list:
`{"func_name": "validate_lowercase", "N": null, ...}` (the Tulu 3 data) and
`{"instruction_id": [...], "kwargs": [{...} | null, ...]}` (IFEval and later data; also with `instruction_id_list`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tulu_hpc.verifiers import constraints_ifeval, constraints_registry  # noqa: F401  (registers instructions)
from tulu_hpc.verifiers.constraints import CONSTRAINTS, check_arguments
from tulu_hpc.verifiers.registry import Verdict, register
from tulu_hpc.verifiers.tulu_functions import COMPAT, FUNCTIONS

Instruction = tuple[str, dict[str, Any]]


def parse_instructions(truth: Any) -> list[Instruction]:
    """Instruction ids and arguments of a ground truth in either format; arguments that are null are dropped.

    Raises:
        ValueError: naming the instruction, function or argument that is wrong.
    """
    truth = _mapping(truth)
    if "func_name" in truth:
        name, given = _function(truth)
        if not isinstance(name, str) or name not in FUNCTIONS:
            raise ValueError(f"ifeval: unknown func_name {name!r:.100}; known: {', '.join(sorted(FUNCTIONS))}")
        instruction_id, names = FUNCTIONS[name]
        # The data carries the arguments of all functions in each row, null or stale: only those of this one are read.
        instructions = [(instruction_id, {ours: given[theirs] for theirs, ours in names.items() if theirs in given})]
    else:
        ids = truth.get("instruction_id", truth.get("instruction_id_list"))
        if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
            got = f"{ids!r:.100}" if ids is not None else f"only {sorted(map(str, truth))}"
            raise ValueError(f"ifeval: a ground truth needs func_name or a list of names instruction_id, got {got}")
        kwargs = truth.get("kwargs")
        if kwargs is None:
            kwargs = [None] * len(ids)
        if not isinstance(kwargs, list) or not all(given is None or isinstance(given, Mapping) for given in kwargs):
            raise ValueError(f"ifeval: kwargs must be a list of mappings or null, got {kwargs!r:.100}")
        if len(kwargs) != len(ids):
            raise ValueError(f"ifeval: {len(ids)} instructions but {len(kwargs)} kwargs")
        instructions = [
            (name, {key: value for key, value in (given or {}).items() if value is not None})
            for name, given in zip(ids, kwargs, strict=True)
        ]
    for instruction_id, arguments in instructions:
        check_arguments(instruction_id, arguments)
    return instructions


def follow_strict(response: str, instructions: list[Instruction]) -> list[bool]:
    """IFEval's strict accuracy: one truth value per instruction; an empty response follows none."""
    return [bool(response.strip()) and CONSTRAINTS[name](response, **kwargs) for name, kwargs in instructions]


def follow_loose(response: str, instructions: list[Instruction]) -> list[bool]:
    """IFEval's loose accuracy: an instruction is followed if one of eight variants of the response follows it.

    The variants drop the first line, the last line, or both, each with and without Markdown asterisks.
    """
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = [text for cut in cuts for text in (cut, cut.replace("*", "")) if text.strip()]
    return [any(CONSTRAINTS[name](text, **kwargs) for text in variants) for name, kwargs in instructions]


def _mapping(truth: Any) -> Mapping[str, Any]:
    while isinstance(truth, str) or (isinstance(truth, list) and len(truth) == 1):
        if isinstance(truth, list):
            truth = truth[0]
            continue
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ValueError(f"ifeval: ground truth is not JSON ({error}): {truth!r:.100}") from None
        except RecursionError:
            raise ValueError(f"ifeval: ground truth is nested too deeply: {truth!r:.100}") from None
    if not isinstance(truth, Mapping):
        raise ValueError(f"ifeval: ground truth must be a mapping, got {truth!r:.100}")
    return truth


def _function(truth: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    arguments = {key: value for key, value in truth.items() if key != "func_name" and value is not None}
    return truth["func_name"], arguments


def _check(truth: Any) -> None:
    parse_instructions(truth)


@register("ifeval", rules=["fixed"], check=_check)
def verify_ifeval(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """1 if every instruction is followed (prompt-level strict); metrics: the loose and the per-instruction scores."""
    instructions = parse_instructions(truth)
    strict, loose = follow_strict(completion, instructions), follow_loose(completion, instructions)
    missed = [name for (name, _), good in zip(instructions, strict, strict=True) if not good]
    metrics = {
        "loose": float(all(loose)),
        "instruction_strict": sum(strict) / len(strict),
        "instruction_loose": sum(loose) / len(loose),
    }
    return Verdict(float(all(strict)), f"not followed: {', '.join(missed)}" if missed else "followed", metrics)


@register("ifeval", rules=["tulu3-compat"], check=_check)
def verify_ifeval_compat(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The rule of the paper's code for `func_name` ground truths; the other format is scored as in `fixed`."""
    mapping = _mapping(truth)
    if "func_name" not in mapping:
        return verify_ifeval(completion, truth, record)
    name, arguments = _function(mapping)
    wanted = FUNCTIONS[name][1]
    good = COMPAT[name](completion.strip(), **{key: arguments[key] for key in wanted})
    return Verdict(float(good), "followed" if good else f"not followed: {name}")
