"""Strict reading of JSON files that programs write, checked against a type and the range of each number.

Counterpart of `typed.py` for state and manifest of a checkpoint, index caches and configs of Hugging Face folders. The
first wrong value raises, with its place in the file: unlike a config, nobody corrects such a file by hand.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

LARGEST = 2**63 - 1
"""Integers above it, or below its negative, are refused: none of the files has one."""


@dataclass(frozen=True)
class Bounds:
    """Range of a number in an `Annotated` type, both ends included."""

    least: float
    most: float = LARGEST


Count = Annotated[int, Bounds(0)]
Positive = Annotated[int, Bounds(1)]
Share = Annotated[float, Bounds(0, 1)]


class WrongValue(ValueError):
    """A value that does not fit the file's format; the message names its place."""


def parse(content: bytes | str) -> Any:
    """Parse JSON more strictly than the standard library: no NaN, no infinity, no key twice.

    Raises:
        WrongValue: `content` is not such JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(content, parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError as error:
        raise WrongValue("nested too deeply") from error
    except WrongValue:
        raise
    except ValueError as error:
        raise WrongValue(str(error)) from error


def _no_number(name: str) -> float:
    raise WrongValue(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise WrongValue(f"key {key!r:.80} is there twice")
            seen.add(key)
    return found


def read_as(kind: type[T] | Any, value: Any, where: str = "") -> Any:
    """Convert a JSON value to a type.

    Args:
        kind: a dataclass (fields without default are required, unknown keys are ignored), `dict[str, X]`,
            `tuple[X, ...]`, `tuple[X, Y]`, `X | None`, `Literal`, `Annotated[number, Bounds]`, `int`, `float` (integers
            are accepted, infinities are not), `bool`, `str`, or `Any`.
        value: result of `parse`, or a part of it.
        where: dotted place of the value, for the message.

    Raises:
        WrongValue: the value is not of the type; the message names place, value and expectation.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _record(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        number = read_as(args[0], value, where)
        if not args[1].least <= number <= args[1].most:
            raise _wrong(where, value, kind)
        return number
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        (inner,) = (arg for arg in args if arg is not NoneType)
        return read_as(inner, value, where)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in args):
            raise _wrong(where, value, kind)
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, value, kind)
        return {key: read_as(args[1], item, _at(where, key)) for key, item in value.items()}
    if origin is tuple:
        return _tuple(args, value, where, kind)
    return _plain(kind, value, where)


def _record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, kind)
    hints = _hints(kind)
    values = {}
    for field in fields(kind):
        if field.name in value:
            values[field.name] = read_as(hints[field.name], value[field.name], _at(where, field.name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise WrongValue(f"{_at(where, field.name)} is missing; expected {describe(hints[field.name])}")
    return kind(**values)


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _tuple(args: tuple[Any, ...], value: Any, where: str, kind: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, value, kind)
    if args[-1] is Ellipsis:
        return tuple(read_as(args[0], item, _at(where, number)) for number, item in enumerate(value))
    if len(args) != len(value):
        raise _wrong(where, value, kind)
    return tuple(read_as(part, item, _at(where, n)) for n, (part, item) in enumerate(zip(args, value, strict=True)))


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float) and abs(value) <= 1e308 and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind and (kind is not int or abs(value) <= LARGEST):
        return value
    raise _wrong(where, value, kind)


def _at(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(where: str, value: Any, kind: Any) -> WrongValue:
    return WrongValue(f"{where or 'the file'} is {_show(value)}; expected {describe(kind)}")


def _show(value: Any) -> str:
    """Return a short description of a value, for messages."""
    # Containers are described by their length: the repr of a large or deep one takes memory or fails.
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if type(value) is int and abs(value) > LARGEST:
        return "a very large number"
    return ascii(value)[:80]


def describe(kind: Any) -> str:
    """Return text that describes the values of a type, for messages."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        least, most = args[1].least, args[1].most
        return f"{describe(args[0])} of at least {least}" + (f" and at most {most}" if most != LARGEST else "")
    if origin in (Union, UnionType):
        return f"{' or '.join(describe(arg) for arg in args if arg is not NoneType)}, or null"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is dict or is_dataclass(kind):
        return "an object"
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    return _WORDS.get(kind, "a value")


_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}

_FILE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff\\]+")


def is_file_name(name: str) -> bool:
    """Whether a name from a file is safe as a path inside a folder: relative, no `..`, usual characters and lengths."""
    parts = name.split("/")
    return (
        bool(_FILE.fullmatch(name))
        and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
        and len(name.encode()) <= 4000
    )
