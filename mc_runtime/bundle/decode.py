"""JSON values into frozen dataclasses, strictly: an unknown or missing key or a wrong type is an error.

A validation library would do this too, at a quarter of a second of imports before the first picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mc_runtime.errors import named

T = TypeVar("T")


class DecodeError(ValueError):
    """A value is not what its field wants; the message begins with the place, as in `engines.step.files`."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}" if place else reason)


def decode(kind: type[T], value: Any, place: str = "") -> T:
    """Build the dataclass `kind` from a JSON object. Raises DecodeError."""
    return cast(T, _dataclass(kind, value, place))


def encode(value: Any) -> Any:
    """The JSON value of a dataclass: tuples become lists, enums their values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value.value if isinstance(value, Enum) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _dataclass(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise DecodeError(place, f"expected an object, found {_show(value)}")
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            raise DecodeError(_join(place, key), "unknown key")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise DecodeError(_join(place, name), "missing")
    hints = _hints(kind)
    arguments = {key: _value(hints[key], item, _join(place, key)) for key, item in value.items()}
    try:
        return kind(**arguments)
    except DecodeError:
        raise
    except ValueError as error:
        raise DecodeError(place, str(error)) from None


def _value(kind: Any, value: Any, place: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _union(arguments, value, place)
    if origin is Literal:
        if value not in arguments or type(value) not in {type(option) for option in arguments}:
            raise DecodeError(place, f"{_show(value)} is none of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, place)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise DecodeError(place, f"expected an object, found {_show(value)}")
        return {key: _value(arguments[1], item, _join(place, key)) for key, item in value.items()}
    if is_dataclass(kind):
        return _dataclass(kind, value, place)
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [option.value for option in kind]
        if value not in names:
            raise DecodeError(place, f"{_show(value)} is none of {', '.join(map(str, names))}")
        return kind(value)
    if type(value) is int and abs(value) >= 2**63:
        raise DecodeError(place, f"expected a number of 64 bits, found {_show(value)}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise DecodeError(place, f"expected {kind.__name__}, found {_show(value)}")
    if kind is float and not isfinite(value):
        raise DecodeError(place, "expected a finite number")
    return value


def _union(options: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in options:
        return None
    error: DecodeError | None = None
    for option in options:
        if option is not type(None):
            try:
                return _value(option, value, place)
            except DecodeError as reason:
                error = error or reason
    raise error or DecodeError(place, f"unexpected {_show(value)}")


def _tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise DecodeError(place, f"expected a list, found {_show(value)}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise DecodeError(place, f"expected {len(kinds)} items, found {len(value)}")
    return tuple(_value(kind, item, f"{place}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _join(place: str, key: str) -> str:
    return f"{place}.{named(key)}" if place else named(key)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
