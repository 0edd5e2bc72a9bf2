"""Does a value have the type that a field's annotation says? For our own dataclasses and for `TrainingArguments`."""

from __future__ import annotations

import collections.abc
import enum
import types
import typing
from typing import Any

__all__ = ["described", "fits", "normal"]

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "null",
    Any: "anything",
}
_LISTS = (list, tuple, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`. An integer is a number; true is not an integer; a string is no list.

    Of a union with an enumeration (`SchedulerType | str`) a string has to be one of the enumeration's values.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        enums = [item for item in arguments if _is_enum(item)]
        if enums and isinstance(value, str):
            return any(fits(value, item) for item in enums)
        return any(fits(value, item) for item in arguments)
    if origin is typing.Literal:
        return any(value == item and type(value) is type(item) for item in arguments)
    if _is_enum(hint):
        return isinstance(value, hint) or value in [item.value for item in hint]
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if (origin or hint) in _LISTS:
        inner = arguments[0] if arguments else Any
        return isinstance(value, (list, tuple)) and all(fits(item, inner) for item in value)
    if (origin or hint) in _MAPPINGS:
        key, inner = arguments or (Any, Any)
        return isinstance(value, collections.abc.Mapping) and all(
            fits(k, key) and fits(item, inner) for k, item in value.items()
        )
    return isinstance(value, hint) if isinstance(hint, type) else True


def normal(value: Any, hint: Any) -> Any:
    """A value that fits, in the annotation's own type: a list for a tuple becomes one, an integer for a number too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return normal(value, next(item for item in arguments if fits(value, item)))
    if (origin or hint) is tuple:
        return tuple(value)
    return float(value) if hint is float else value


def described(hint: Any) -> str:
    """The annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        enums = [item for item in arguments if _is_enum(item)]
        shown = [item for item in arguments if item is not type(None) and not (enums and item is str)]
        return " or ".join(dict.fromkeys(described(item) for item in shown))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if _is_enum(hint):
        return "one of " + ", ".join(repr(item.value) for item in hint)
    if (origin or hint) in _LISTS:
        return "a list" + (f" of {_plural(arguments[0])}" if arguments else "")
    if (origin or hint) in _MAPPINGS:
        return "a mapping"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _plural(hint: Any) -> str:
    return {str: "strings", int: "integers", float: "numbers"}.get(hint, "values")


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)
