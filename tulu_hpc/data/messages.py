"""The turns of a conversation, and the tools it may call, from the row of a file. No torch is imported here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tulu_hpc.data.rows import NOT_TEXT, is_text, json_text, show

ROLES = ("system", "user", "assistant", "tool")
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions, in the form that the chat template expects


class FieldError(ValueError):
    """A field of a row does not fit its schema."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `message["role"]` works too, as chat templates expect.

    Attributes:
        role: one of ROLES.
        content: may be empty for a tool's answer and for an assistant turn that calls tools.
        extra: what else chat templates read, as plain JSON: `tool_calls` of an assistant turn (arguments as an object),
            `tool_call_id` and `name` of a tool's answer.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    @property
    def tool_calls(self) -> list[Mapping[str, Any]]:
        """`{"name": ..., "arguments": {...}}` of each call."""
        return [call["function"] for call in self.extra.get("tool_calls", [])]

    def to_dict(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


def read_messages(row: Mapping[str, Any], name: str) -> list[Message]:
    value = row.get(name)
    if value is None:
        near = ", ".join(sorted(str(key) for key in row)) or "none"
        raise FieldError(name, f"is missing (fields of the row: {near})")
    if not isinstance(value, list) or not value:
        raise FieldError(name, f"is {show(value)}, need a list of at least one message")
    messages = []
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, Mapping):
            raise FieldError(where, f"is {show(message)}, need an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise FieldError(f"{where}.role", f"is {show(role)}, need one of {', '.join(ROLES)}")
        extra = _extra(message, role, where)
        if content is None and "tool_calls" in extra:
            content = ""
        if not isinstance(content, str):
            raise FieldError(f"{where}.content", f"is {show(content)}, need a string")
        if not is_text(content):
            raise FieldError(f"{where}.content", NOT_TEXT)
        if not content.strip() and role != "tool" and "tool_calls" not in extra:
            raise FieldError(f"{where}.content", "is empty")
        messages.append(Message(role, content, extra))
    return messages


def _extra(message: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """The parts of a message that only tools need; absent and null are the same, as tables have a column for all."""
    extra: dict[str, Any] = {}
    if calls := message.get("tool_calls"):
        if role != "assistant":
            raise FieldError(f"{where}.tool_calls", f"belong to an assistant turn, not to {role!r}")
        if not isinstance(calls, list):
            raise FieldError(f"{where}.tool_calls", f"is {show(calls)}, need a list")
        extra["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for name in ("tool_call_id", "name"):
        value = message.get(name)
        if role == "tool" and value:
            if not isinstance(value, str) or not is_text(value):
                raise FieldError(f"{where}.{name}", f"is {show(value)}, need a string")
            extra[name] = value
    return extra


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """`{"id", "type": "function", "function": {"name", "arguments"}}`; arguments may come as the text of an object,
    which is how tables hold objects of different keys."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise FieldError(where, f"is {show(call)}, need a function with a name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise FieldError(f"{where}.function.arguments", f"not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise FieldError(f"{where}.function.arguments", f"is {show(arguments)}, need an object")
    try:
        json_text(arguments)
    except ValueError as error:
        raise FieldError(f"{where}.function.arguments", str(error)) from None
    assert isinstance(call, Mapping)
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def read_tools(row: Mapping[str, Any]) -> Tools:
    """The functions a conversation may call: a list of objects, or its text."""
    value = row.get("tools")
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise FieldError("tools", f"not JSON: {error}") from None
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise FieldError("tools", f"is {show(value)}, need a list of objects")
    try:
        json_text(value)
    except ValueError as error:
        raise FieldError("tools", str(error)) from None
    return tuple(value)
