"""Explains why a JSON body is invalid: the field, what was sent, and what is allowed."""

import functools
from typing import Any

import msgspec
from msgspec import inspect

from embedding_service.errors import InvalidRequest
from embedding_service.words import allowed

# Longer values are described instead of quoted.
MAX_QUOTED_CHARACTERS = 40

# JSON's names for Python types.
NAMES = {str: "a string", list: "an array", dict: "an object", bool: "true or false", type(None): "null"}

PLAIN: dict[type[inspect.Type], type] = {
    inspect.StrType: str,
    inspect.BoolType: bool,
    inspect.NoneType: type(None),
    inspect.ListType: list,
    inspect.StructType: dict,
    inspect.DictType: dict,
}


def explain(kind: type, raw: bytes) -> InvalidRequest:
    """The error for a body of valid JSON that does not match the type."""
    try:
        value = msgspec.json.decode(raw)
    except msgspec.ValidationError:
        return InvalidRequest("the body has a number that is out of range")
    return _fault(_type(kind), value) or InvalidRequest("the body does not match what this route accepts")


@functools.cache
def _type(kind: type) -> inspect.Type:
    return inspect.type_info(kind)


def _fault(
    kind: inspect.Type, value: Any, field: str | None = None, index: int | None = None
) -> InvalidRequest | None:
    """The error for the first place where the value does not match the type."""
    members = _members(kind)
    path = field if index is None else f"{field}[{index}]"
    for member in members:
        if isinstance(member, inspect.StructType) and isinstance(value, dict):
            return _fault_in_fields(member, value, path)
        if isinstance(member, inspect.ListType) and isinstance(value, list):
            items = (_fault(member.item_type, item, path, i) for i, item in enumerate(value))
            return next((fault for fault in items if fault), None)
    if any(_accepts(member, value) for member in members):
        return None
    reason = f"must be {allowed(kind, _quoted)}, not {_sent(value)}"
    return InvalidRequest(f"the body {reason}" if field is None else reason, field=field, index=index)


def _fault_in_fields(
    kind: inspect.StructType, value: dict[str, Any], parent: str | None
) -> InvalidRequest | None:
    for member in kind.fields:
        name = member.encode_name
        path = name if parent is None else f"{parent}.{name}"
        if name not in value:
            if member.required:
                return InvalidRequest("is missing", field=path)
        elif fault := _fault(member.type, value[name], path):
            return fault
    return None


def _members(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    if isinstance(kind, inspect.Metadata):
        return _members(kind.type)
    if isinstance(kind, inspect.UnionType):
        return tuple(member for part in kind.types for member in _members(part))
    return (kind,)


def _accepts(kind: inspect.Type, value: Any) -> bool:
    if isinstance(kind, inspect.LiteralType):
        return value in kind.values
    if isinstance(kind, inspect.IntType):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            return False
        return (kind.ge is None or value >= kind.ge) and (kind.le is None or value <= kind.le)
    if isinstance(kind, inspect.StrType) and isinstance(value, str):
        return kind.max_length is None or len(value) <= kind.max_length
    return isinstance(value, PLAIN.get(type(kind), object))


def _quoted(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _sent(value: Any) -> str:
    if isinstance(value, str | int | float):
        quoted = _quoted(value)
        if len(quoted) <= MAX_QUOTED_CHARACTERS:
            return quoted
    return NAMES.get(type(value), "a number")
