"""docs/configuration.md, written from the schema: `python -m tulu_hpc.config.reference > docs/configuration.md`."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tulu_hpc.config.run_directory import MAY_DIFFER
from tulu_hpc.config.sections import fields_by_key
from tulu_hpc.config.verbs import SCHEMAS

HEADER = """# Configuration reference

Written by `python -m tulu_hpc.config.reference > docs/configuration.md`: edit `tulu_hpc/config/`, not this file.

```
tulu-hpc VERB CONFIG.yaml [section.key=value ...] [--print-config]
```

* `configs/...` that is not in the working directory is taken from the installed package.
* `extends: other.yaml` (or a list) starts from other files, relative to this one; later wins, mappings merge by key.
* `{root}` in any text is replaced by `run.root`.
* Overrides are YAML: `optimizer.lr=5e-6`, `train.epochs=null`, `data.path=[a.jsonl,b.jsonl]`.
* Unknown keys and wrong types are refused with file, line and the nearest right name. Numbers are YAML 1.2: `5e-6` is a
  number, `no` is a text.
* The resolved configuration is saved as `config.resolved.yaml` in the run directory. A run resumed there must have the
  same one, except for: MAY_DIFFER.
"""


TABLE = ["| key | type | default | meaning |", "|---|---|---|---|"]


def reference() -> str:
    """The whole page: which sections each verb reads, then every section once."""
    sections: dict[str, list[type[BaseModel]]] = {}
    plain: dict[str, FieldInfo] = {}
    lines = [HEADER.replace("MAY_DIFFER", ", ".join(f"`{key}`" for key in MAY_DIFFER)), "## Verbs\n"]
    lines += ["| verb | sections (**required**) |", "|---|---|"]
    for verb, schema in SCHEMAS.items():
        names = []
        for name, info in fields_by_key(schema).items():
            model = _model_of(info.annotation)
            if model is None:
                plain.setdefault(name, info)
                continue
            shown = sections.setdefault(name, [])
            if model not in shown:
                shown.append(model)
            anchor = _anchor(name, model, shown)
            names.append(f"**[{name}](#{anchor})**" if info.is_required() else f"[{name}](#{anchor})")
        lines.append(f"| `{verb}` | {', '.join(names)} |")
    if plain:
        lines += ["", "## Keys outside sections", "", *TABLE, *(_row(name, info) for name, info in plain.items())]
    for name, models in sections.items():
        for model in models:
            lines += ["", f"## {_heading(name, model, models)}", ""]
            if model.__doc__ and model.__doc__ != BaseModel.__doc__:
                lines += [model.__doc__.strip().splitlines()[0], ""]
            lines += TABLE
            lines += _rows(model, "")
    return "\n".join(lines) + "\n"


def _heading(name: str, model: type[BaseModel], models: list[type[BaseModel]]) -> str:
    return name if model is models[0] else f"{name} ({model.__name__.removesuffix('Section')})"


def _anchor(name: str, model: type[BaseModel], models: list[type[BaseModel]]) -> str:
    return _heading(name, model, models).lower().replace(" ", "-").replace("(", "").replace(")", "")


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, info in fields_by_key(model).items():
        inner = _model_of(info.annotation)
        is_list = get_origin(info.annotation) is list
        key = f"{prefix}{name}"
        rows.append(_row(key, info))
        if inner is not None:
            rows += _rows(inner, f"{key}[]." if is_list else f"{key}.")
    return rows


def _row(key: str, info: FieldInfo) -> str:
    meaning = f"{info.description or ''}{_limits(info)}".strip()
    cells = [f"`{key}`", _type_text(info.annotation), _default(info), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_model_of, get_args(annotation)) if found is not None), None)


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "empty"
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_type_text(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type_text(argument) for argument in arguments)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "true/false"}.get(annotation, "any")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "empty"
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def _limits(info: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in info.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f" ({', '.join(limits)})" if limits else ""


if __name__ == "__main__":
    print(reference(), end="")
