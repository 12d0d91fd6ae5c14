"""Reads a YAML file into a typed configuration; errors name file, line and key.

A file may start from others (`extends: base.yaml`, or a list, relative to the file). Later wins: mappings are merged
key by key, everything else is replaced. Dotted overrides come last, then `{root}` is replaced by `run.root`. Scalars
follow YAML 1.2 (`5e-6` is a number, `no` and `12:30` are strings), types are checked strictly (no string becomes a
number), duplicate keys are refused.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from tulu_hpc.config.sections import RunSection, fields_by_key

Config = TypeVar("Config", bound=BaseModel)

COMMAND_LINE = "command line"
ROOT_PLACEHOLDER = "{root}"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the dotted key and what would be right."""


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML resolves scalars by YAML 1.1, where 5e-6 is a string and 12:30 is 750; these rules are YAML 1.2's."""


_Yaml12Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL", "~nN"),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
# PyYAML looks the empty scalar (`key:`) up under the empty string.
_Yaml12Loader.yaml_implicit_resolvers[""] = [("tag:yaml.org,2002:null", re.compile("^$"))]


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    try:
        # int(text, 0) would refuse 007; YAML 1.2 reads it as decimal.
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    except ValueError:  # Python's limit of digits
        raise yaml.constructor.ConstructorError(
            None, None, f"an integer of {len(text)} digits", node.start_mark
        ) from None


_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass
class _Document:
    """Plain data, and where each dotted key was written."""

    data: dict[str, Any]
    origin: dict[tuple[str, ...], str] = field(default_factory=dict)


def load_config(
    path: Path | str, overrides: Sequence[str], schema: type[Config], *, origin: str = COMMAND_LINE
) -> Config:
    """Read `path`, apply `a.b=c` overrides (values are YAML) and check against `schema`.

    Args:
        origin: where the overrides come from, for messages.

    Raises:
        ConfigError: every problem on a line of its own.
    """
    path = find_config(path)
    document = _read(path, ())
    for text in overrides:
        _apply_override(document, text, origin)
    _substitute_root(document.data)
    return _validate(document, schema, str(path))


def find_config(path: Path | str) -> Path:
    """The path itself; for `configs/...` that is not in the working directory, that of the checkout or the wheel."""
    given = Path(path)
    if given.exists() or given.parts[:1] != ("configs",):
        return given
    package = Path(__file__).resolve().parents[1]
    shipped = (folder / given for folder in (package.parent, package))
    return next((file for file in shipped if file.is_file()), given)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The merged plain data of a file and all it extends, unchecked."""
    return _read(find_config(path), ()).data


def dump_yaml(config: BaseModel) -> str:
    """The whole configuration as YAML; `load_config` of it gives the same object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested mappings; lists are leaves."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, data


# ---- reading -------------------------------------------------------------------------------------------------------


def _read(path: Path, parents: tuple[Path, ...]) -> _Document:
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(str(p) for p in (*parents, resolved))
        raise ConfigError(f"{path}: extends itself: {chain}")
    if not path.is_file():
        referrer = f" (extended by {parents[-1]})" if parents else ""
        kind = "is a directory, not a file" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {kind}{referrer}")
    document = _parse(path)
    extends = document.data.pop("extends", [])
    bases = [extends] if isinstance(extends, str) else extends
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: expected a file name or a list of file names, got {extends!r}")
    merged = _Document({})
    for base in bases:
        _merge(merged, _read(path.parent / base, (*parents, resolved)))
    _merge(merged, document)
    return merged


def _parse(path: Path) -> _Document:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        loader = _Yaml12Loader(text)
        node = loader.get_single_node()
        if node is None:
            return _Document({})
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected `key: value` at the top level")
        document = _Document({})
        _note_lines(node, (), path, document.origin)
        document.data = loader.construct_document(node)
        _require_plain(document.data, document.origin)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        row = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{row}: not valid YAML: {_unreadable(error)}") from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    return document


def _unreadable(error: yaml.reader.ReaderError) -> str:
    return f"the character U+{ord(error.character) if isinstance(error.character, str) else error.character:04X}"


def _require_plain(value: Any, origin: dict[tuple[str, ...], str], at: tuple[str, ...] = ()) -> None:
    """Tags such as `!!binary` make values that no key takes; `"\\ud800"` is half a character."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _require_plain(item, origin, (*at, str(key)))
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ConfigError(f"{origin.get(at, '')}: {'.'.join(at)}: a {type(value).__name__} is no value here")
    for text in (*at[-1:], value):
        if isinstance(text, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
            raise ConfigError(f"{origin.get(at, '')}: {'.'.join(at)!a}: holds NUL or half of a surrogate pair")


def _note_lines(node: yaml.Node, at: tuple[str, ...], path: Path, origin: dict[tuple[str, ...], str]) -> None:
    origin[at] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in seen:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: {'.'.join((*at, key))}: given twice")
            seen.add(key)
            _note_lines(value_node, (*at, key), path, origin)
            origin[(*at, key)] = f"{path}:{key_node.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, (*at, str(index)), path, origin)


def _merge(base: _Document, top: _Document) -> None:
    base.data = _merge_data(base.data, top.data)
    base.origin.update(top.origin)


def _merge_data(base: Any, top: Any) -> Any:
    if isinstance(base, dict) and isinstance(top, dict):
        merged = dict(base)
        for key, value in top.items():
            merged[key] = _merge_data(base[key], value) if key in base else value
        return merged
    return top


def _apply_override(document: _Document, text: str, origin: str) -> None:
    key, equals, value_text = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"{origin}: {text!r}: expected section.key=value")
    value = _parse_value(parts, value_text, origin)
    target = document.data
    for depth, part in enumerate(parts[:-1]):
        if target.get(part) is None:
            target[part] = {}
            document.origin[parts[: depth + 1]] = origin
        if not isinstance(target[part], dict):
            where = ".".join(parts[: depth + 1])
            raise ConfigError(f"{origin}: {key}: {where} is {target[part]!r}, not a section with keys")
        target[part] = dict(target[part])
        target = target[part]
    target[parts[-1]] = value
    document.origin[parts] = origin


def _parse_value(key: tuple[str, ...], text: str, origin: str) -> Any:
    if text.startswith(ROOT_PLACEHOLDER):
        return text  # YAML would take the brace for a mapping
    try:
        value = _Yaml12Loader(text).get_single_data()
        _require_plain(value, {key: origin}, key)
        return value
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{origin}: {'.'.join(key)}: not a YAML value: {text!r:.100}") from error


def _substitute_root(data: dict[str, Any]) -> None:
    run = data.get("run")
    default = RunSection.model_fields["root"].default
    root = run.get("root", default) if isinstance(run, dict) else default
    if not isinstance(root, str):
        return  # the type check reports it
    if ROOT_PLACEHOLDER in root:
        raise ConfigError(f"run.root: {root!r} cannot contain {ROOT_PLACEHOLDER}: it is what replaces it")

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(ROOT_PLACEHOLDER, root)
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item) for item in value]
        return value

    data.update({key: replace(value) for key, value in data.items()})


# ---- checking ------------------------------------------------------------------------------------------------------


def _validate(document: _Document, schema: type[Config], file: str) -> Config:
    try:
        # Through JSON: strict there means "no string becomes a number" while a list may still fill a tuple.
        config = schema.model_validate_json(json.dumps(document.data), strict=True)
        defaults = config.model_dump_json()
        if ROOT_PLACEHOLDER not in defaults:
            return config
        # A default of the schema speaks of the root.
        data = json.loads(defaults)
        _substitute_root(data)
        return schema.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        lines = [_explain(problem, document, schema, file) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _explain(problem: Any, document: _Document, schema: type[BaseModel], file: str) -> str:
    loc = tuple(str(part) for part in problem["loc"])
    dotted = ".".join(loc) or "(top level)"
    value = problem.get("input")
    if problem["type"] == "missing":
        return f"{_where(document, loc[:-1], file)}: {dotted}: missing{_help_of(schema, loc)}"
    where = _where(document, loc, file)
    if problem["type"] == "extra_forbidden":
        return f"{where}: {dotted}: unknown key{_suggestion(schema, loc)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {dotted}: {message}"
    hint = "; write it in quotes" if problem["type"] == "string_type" and isinstance(value, int | float) else ""
    message = message.replace("Input should be", "expected").replace("an object", "a section")
    return f"{where}: {dotted}: {message}, got {value!r} ({_yaml_type(value)}){hint}"


def _where(document: _Document, loc: tuple[str, ...], file: str) -> str:
    """Where the key, or its nearest enclosing section, was written."""
    for end in range(len(loc), 0, -1):
        if loc[:end] in document.origin:
            return document.origin[loc[:end]]
    return file


def _yaml_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "list", dict: "section"}
    return "empty" if value is None else names.get(type(value), type(value).__name__)


def _fields_at(schema: type[BaseModel], loc: tuple[str, ...]) -> type[BaseModel] | None:
    """The model that holds the keys below `loc`."""
    current: Any = schema
    for part in loc:
        current = next((model for model in _models_of(current)), None)
        if current is None:
            return None
        if not part.isdigit():
            info = fields_by_key(current).get(part)
            if info is None:
                return None
            current = info.annotation
    return next(iter(_models_of(current)), None)


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models inside an annotation such as `X`, `X | None`, `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, list, tuple):
        for argument in get_args(annotation):
            yield from _models_of(argument)


def dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema; the items of a list of sections appear as `key.N.name`."""
    for name, info in fields_by_key(schema).items():
        yield prefix + name
        inner = next(iter(_models_of(info.annotation)), None)
        if inner is not None:
            item = "N." if get_origin(info.annotation) is list else ""
            yield from dotted_keys(inner, f"{prefix}{name}.{item}")


def _suggestion(schema: type[BaseModel], loc: tuple[str, ...]) -> str:
    section = _fields_at(schema, loc[:-1])
    prefix = ".".join(loc[:-1])
    siblings = list(fields_by_key(section)) if section else []
    near = difflib.get_close_matches(loc[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {f'{prefix}.' if prefix else ''}{near[0]}?"
    everywhere = list(dotted_keys(schema))
    same_leaf = [key for key in everywhere if key.rsplit(".", 1)[-1] == loc[-1]]
    near = same_leaf[:1] or difflib.get_close_matches(".".join(loc), everywhere, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(sorted(siblings))}" if siblings else ""


def _help_of(schema: type[BaseModel], loc: tuple[str, ...]) -> str:
    section = _fields_at(schema, loc[:-1])
    info = fields_by_key(section).get(loc[-1]) if section else None
    return f" ({info.description.rstrip('.')})" if info is not None and info.description else ""
