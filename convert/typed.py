"""JSON that somebody else may have written, read into dataclasses; a value of the wrong type is named by its key."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Misfit(Exception):  # noqa: N818
    """A value is not of its type. The text is its key, such as `drops[0].reason`."""


def read(kind: type[T], value: object, name: str = "") -> T:
    """Turn a JSON value into a dataclass.

    Its fields are texts, numbers of at most 64 bits, booleans, `Any`, dataclasses, and `T | None`, `tuple[T, ...]` and
    `Mapping[str, T]` of these; `Annotated[str, pattern]` is a text that the pattern matches. A key may be absent where the
    field has a default value. Other keys are left alone, unless the class says `closed = True`. What a dataclass itself
    refuses with a ValueError is refused here.

    Args:
        kind: the dataclass.
        value: the JSON value.
        name: its own key, for the error.

    Raises:
        Misfit: the first key that is wrong.

    Example:
        >>> @dataclasses.dataclass
        ... class Row:
        ...     key: str
        ...     count: int = 0
        >>> read(Row, {"key": "a"})
        Row(key='a', count=0)
    """
    made: T = _read(kind, value, name)
    return made


def _read(kind: Any, value: object, name: str) -> Any:
    if kind is Any:
        return value
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _matching(parts[1], value, name)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(next(part for part in parts if part is not type(None)), value, name)
    if origin is tuple:
        return tuple(_read(parts[0], item, f"{name}[{index}]") for index, item in enumerate(_of(list, value, name)))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(parts, _of(dict, value, name), name)
    if dataclasses.is_dataclass(kind):
        return _object(kind, _of(dict, value, name), name)
    if kind is float:
        return float(_of(int, value, name) if isinstance(value, int) else _of(float, value, name))
    return _of(kind, value, name)


def _of(kind: Any, value: Any, name: str) -> Any:
    """Return a value of exactly this type: to Python, `True` is a number too."""
    if type(value) is not kind or (kind is int and not -(2**63) <= value < 2**63):
        raise Misfit(name or "the whole")
    return value


def _matching(pattern: re.Pattern[str], value: object, name: str) -> str:
    if type(value) is not str or not pattern.fullmatch(value):
        raise Misfit(name)
    return value


def _mapping(parts: tuple[Any, ...], values: dict[str, Any], name: str) -> dict[str, Any]:
    of_key, of_value = parts
    if of_key is not str:
        for key in values:
            _read(of_key, key, f"{name}: {key[:60]!r}")
    if of_value is str and all(type(item) is str for item in values.values()):
        return values
    return {key: _read(of_value, item, f"{name}.{key[:60]}") for key, item in values.items()}


def _object(kind: Any, values: dict[str, Any], name: str) -> Any:
    made: dict[str, Any] = {}
    for field, of_field, needed in _fields(kind):
        if field in values:
            made[field] = _read(of_field, values[field], f"{name}.{field}" if name else field)
        elif needed:
            raise Misfit(f"{name}.{field}" if name else field)
    if getattr(kind, "closed", False):
        for key in values.keys() - made.keys():
            raise Misfit(f"{name}.{key[:60]}")
    try:
        return kind(**made)
    except ValueError as error:
        raise Misfit(f"{name}.{error}" if name else str(error)) from None


@functools.cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    none = dataclasses.MISSING
    return [
        (field.name, hints[field.name], field.default is none and field.default_factory is none)
        for field in dataclasses.fields(kind)
    ]
