"""JSON answers against a JSON Schema (`json_schema`).

The keywords are those of draft 2020-12 that say something about plain data; a schema with any other keyword is refused
before the run, because a keyword that is skipped would accept what it was written to refuse. `$ref` may point into the
schema itself (`#/$defs/...`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tulu_hpc.verifiers.registry import Verdict, register

_ANNOTATIONS = frozenset(["$schema", "$id", "$comment", "$defs", "definitions"]) | frozenset(
    ["title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly"]
)
_FENCE = re.compile(r"```[A-Za-z]*\s*\n(.*?)\n?\s*```", re.DOTALL)
_MAX_DEPTH = 100

Found = Iterator[str]  # what is wrong, with its place


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


_LIMITS: dict[str, tuple[Callable[[Any], bool], Callable[[Any, Any], bool]]] = {
    "minimum": (_is_number, lambda value, bound: value >= bound),
    "maximum": (_is_number, lambda value, bound: value <= bound),
    "exclusiveMinimum": (_is_number, lambda value, bound: value > bound),
    "exclusiveMaximum": (_is_number, lambda value, bound: value < bound),
    "multipleOf": (_is_number, lambda value, unit: float(value / unit).is_integer()),
    "minLength": (_TYPES["string"], lambda value, bound: len(value) >= bound),
    "maxLength": (_TYPES["string"], lambda value, bound: len(value) <= bound),
    "pattern": (_TYPES["string"], lambda value, pattern: re.search(pattern, value) is not None),
    "minItems": (_TYPES["array"], lambda value, bound: len(value) >= bound),
    "maxItems": (_TYPES["array"], lambda value, bound: len(value) <= bound),
    "uniqueItems": (_TYPES["array"], lambda value, on: not on or _all_different(value)),
    "minProperties": (_TYPES["object"], lambda value, bound: len(value) >= bound),
    "maxProperties": (_TYPES["object"], lambda value, bound: len(value) <= bound),
    "required": (_TYPES["object"], lambda value, names: all(name in value for name in names)),
    "enum": (lambda value: True, lambda value, options: any(same(value, option) for option in options)),
    "const": (lambda value: True, same),
}
_STRUCTURE = frozenset(["type", "properties", "patternProperties", "additionalProperties", "items", "prefixItems"])
_STRUCTURE |= {"allOf", "anyOf", "oneOf", "not", "$ref"}
_SCHEMAS = ("additionalProperties", "items", "not")
_SCHEMA_LISTS = ("prefixItems", "allOf", "anyOf", "oneOf")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")


def _all_different(values: Sequence[Any]) -> bool:
    return not any(same(a, b) for i, a in enumerate(values) for b in values[:i])


def check_schema(schema: Any, root: Any = None, place: str = "#") -> None:
    """Refuse a schema that cannot be applied as a whole.

    Raises:
        ValueError: naming the place and the keyword.
    """
    root = schema if root is None else root
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"json_schema: {place} must be a mapping or a truth value, got {schema!r:.100}")
    for key, value in schema.items():
        if key not in _ANNOTATIONS and key not in _LIMITS and key not in _STRUCTURE:
            raise ValueError(f"json_schema: {place}: keyword {key!r} is not supported")
        _check_value(key, value, root, f"{place}/{key}")


def _check_value(key: str, value: Any, root: Any, place: str) -> None:
    if key == "type":
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(name in _TYPES for name in names):
            raise ValueError(f"json_schema: {place}: unknown type {value!r:.100}")
    elif key == "$ref":
        _resolve(value, root)
    elif key == "pattern" or key == "patternProperties":
        for pattern in value if isinstance(value, Mapping) else [value]:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"json_schema: {place}: not a regular expression ({error})") from None
    elif key in ("enum", "required") and not isinstance(value, list):
        raise ValueError(f"json_schema: {place} must be a list, got {value!r:.100}")
    elif key == "multipleOf" and (not _is_number(value) or value <= 0):
        raise ValueError(f"json_schema: {place} must be a number above 0, got {value!r:.100}")
    elif key.startswith(("min", "max", "exclusive")) and not _is_number(value):
        raise ValueError(f"json_schema: {place} must be a number, got {value!r:.100}")
    if key in _SCHEMAS:
        check_schema(value, root, place)
    elif key in _SCHEMA_LISTS:
        if not isinstance(value, list) or not value:
            raise ValueError(f"json_schema: {place} must be a list of schemas, got {value!r:.100}")
        for i, inner in enumerate(value):
            check_schema(inner, root, f"{place}/{i}")
    elif key in _SCHEMA_MAPS:
        if not isinstance(value, Mapping):
            raise ValueError(f"json_schema: {place} must be a mapping of schemas, got {value!r:.100}")
        for name, inner in value.items():
            check_schema(inner, root, f"{place}/{name}")


def _resolve(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise ValueError(f"json_schema: $ref must point into the schema ('#/...'), got {reference!r:.100}")
    target = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(name)] if isinstance(target, list) else target[name]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"json_schema: $ref {reference!r} points nowhere") from None
    return target


def violations(value: Any, schema: Any, root: Any = None, place: str = "$", depth: int = 0) -> Found:
    """What is wrong with a value, each with its place in the value; nothing if it is valid."""
    root = schema if root is None else root
    if depth > _MAX_DEPTH:
        raise ValueError(f"json_schema: nested deeper than {_MAX_DEPTH} schemas at {place}")
    if isinstance(schema, bool):
        if not schema:
            yield f"{place}: nothing is allowed here"
        return
    if "$ref" in schema:
        yield from violations(value, _resolve(schema["$ref"], root), root, place, depth + 1)
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_TYPES[name](value) for name in names):
            yield f"{place}: not of type {' or '.join(names)}"
    for key, (applies, holds) in _LIMITS.items():
        if key in schema and applies(value) and not holds(value, schema[key]):
            yield f"{place}: {key} {schema[key]!r:.60} does not hold"
    yield from _combined(value, schema, root, place, depth)
    if isinstance(value, dict):
        yield from _members(value, schema, root, place, depth)
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        for i, item in enumerate(value):
            inner = first[i] if i < len(first) else schema.get("items", True)
            yield from violations(item, inner, root, f"{place}[{i}]", depth + 1)


def _combined(value: Any, schema: Mapping[str, Any], root: Any, place: str, depth: int) -> Found:
    def valid(inner: Any) -> bool:
        return next(violations(value, inner, root, place, depth + 1), None) is None

    for inner in schema.get("allOf", []):
        yield from violations(value, inner, root, place, depth + 1)
    if "anyOf" in schema and not any(map(valid, schema["anyOf"])):
        yield f"{place}: none of anyOf holds"
    if "oneOf" in schema and (count := sum(map(valid, schema["oneOf"]))) != 1:
        yield f"{place}: {count} of oneOf hold"
    if "not" in schema and valid(schema["not"]):
        yield f"{place}: what 'not' forbids"


def _members(value: Mapping[str, Any], schema: Mapping[str, Any], root: Any, place: str, depth: int) -> Found:
    named, patterned = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, member in value.items():
        inner = [named[name]] if name in named else []
        inner += [found for pattern, found in patterned.items() if re.search(pattern, name)]
        for found in inner or [schema.get("additionalProperties", True)]:
            yield from violations(member, found, root, f"{place}.{name}", depth + 1)


def read_answer(completion: str) -> Any:
    """The JSON value of an answer: the whole text, or the content of its only fenced block.

    Raises:
        ValueError: it is no JSON, or holds a number that JSON does not know (NaN, Infinity).
    """
    text = completion.strip()
    fenced = _FENCE.findall(text)
    if len(fenced) == 1:
        text = fenced[0]

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _schema(truth: Any) -> Any:
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ValueError(f"json_schema: the ground truth is not JSON ({error}): {truth!r:.100}") from None
    if not isinstance(truth, Mapping):
        raise ValueError(f"json_schema: the ground truth must be a JSON Schema (a mapping), got {truth!r:.100}")
    return truth


def _check(truth: Any) -> None:
    check_schema(_schema(truth))


@register("json_schema", check=_check)
def verify_json_schema(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """The answer, or its only fenced block, is JSON that the schema accepts."""
    try:
        value = read_answer(completion)
    except ValueError as error:
        return Verdict(0.0, f"no JSON: {error}")
    wrong = next(violations(value, _schema(truth)), None)
    return Verdict(float(wrong is None), wrong or "valid")
