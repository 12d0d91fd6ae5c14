"""Compares the signature of a library's function with what is passed to it, before the first call.

Private functions of other libraries move between versions. A wrong position would compute something else without an
error, so names, positions and the defaults that are relied on are checked when the function is loaded.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One declared parameter; `default` is `inspect.Parameter.empty` where there is none."""

    name: str
    default: Any = _REQUIRED
    keyword_only: bool = False

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED


@dataclass(frozen=True)
class Wanted:
    """What is passed to a function, and what is left to it.

    Attributes:
        function: its name in its module.
        positional: passed by position; must be its first parameters, in this order.
        keywords: passed by name.
        defaults: not passed; must exist with this default, because the result depends on it.
    """

    function: str
    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """Declared parameters of a Python function, a torch op or a function registered as one; *args are no declaration.

    Raises:
        TypeError: it has no signature that can be read.
    """
    # A torch.library.custom_op takes (*args, **kwargs) in Python; its schema has the names.
    overload = getattr(function, "_opoverload", None)
    if isinstance(function, torch._ops.OpOverloadPacket):
        overload = function.default
    if overload is not None:
        return [
            Parameter(a.name, a.default_value if a.has_default_value() else _REQUIRED, a.kwarg_only)
            for a in overload._schema.arguments
        ]
    try:
        declared = inspect.signature(function).parameters.values()
    except ValueError as reason:
        raise TypeError(f"the signature of {function!r} cannot be read: {reason}") from reason
    return [
        Parameter(p.name, p.default, p.kind is p.KEYWORD_ONLY)
        for p in declared
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def differences(declared: Sequence[Parameter], wanted: Wanted) -> list[str]:
    """What keeps `wanted` from meaning the same as when it was written; empty when nothing does.

    Further parameters with a default are no difference: libraries grow, and a default keeps the old meaning.
    """
    found = []
    by_name = {p.name: p for p in declared}
    order = [p.name for p in declared if not p.keyword_only]
    for place, name in enumerate(wanted.positional):
        if place >= len(order):
            found.append(f"parameter {place + 1} must be {name!r}, there are {len(order)} by position")
        elif order[place] != name:
            found.append(f"parameter {place + 1} must be {name!r}, it is {order[place]!r}")
    for name in wanted.keywords:
        if name not in by_name:
            found.append(f"it has no parameter {name!r}")
        elif name in order[: len(wanted.positional)]:
            found.append(f"parameter {name!r} is passed by name and its place is taken by position")
    for name, value in wanted.defaults.items():
        if name not in by_name:
            found.append(f"it has no parameter {name!r}")
        elif by_name[name].required:
            found.append(f"parameter {name!r} has no default, expected {value!r}")
        elif by_name[name].default != value or type(by_name[name].default) is not type(value):
            found.append(f"parameter {name!r} has the default {by_name[name].default!r}, expected {value!r}")
    passed = {*wanted.positional, *wanted.keywords, *wanted.defaults}
    found += [f"it wants a new argument {p.name!r}" for p in declared if p.required and p.name not in passed]
    return found
