"""Conversion of plain YAML values to the typed config tree: strict, collecting every mismatch instead of stopping."""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megabagel.config.schema import Config
from megabagel.errors import printable

T = TypeVar("T")


@dataclass
class Problems:
    """Problems found so far, in order."""

    found: list[tuple[str, str]] = field(default_factory=list)
    """(dotted key, one line of text)."""
    doubtful: set[str] = field(default_factory=set)
    """Keys whose value in the built tree is not what the user meant; rules between fields skip them."""

    def add(self, key: str, text: str, *related: str) -> None:
        """Add a problem at `key`; `related` keys become doubtful as well."""
        self.found.append((key, text))
        self.doubtful.update((key, *related))


_EXPLAINED = 20
"""Unknown keys of one load for which similar keys are looked up."""


class _Mismatch(Exception):
    """The value does not have the type of its field."""


def build(kind: type[T], raw: Any, problems: Problems, path: str = "") -> T:
    """Build a config dataclass from a mapping. A field with a problem keeps its default, so that checks can go on.

    Args:
        kind: dataclass of the schema.
        raw: mapping read from YAML.
        problems: collects mismatches.
        path: dotted key of `raw`.
    """
    hints = get_type_hints(kind)
    if not isinstance(raw, dict):
        problems.add(path, f"{path} = {show(raw)}: expected a mapping with keys out of {', '.join(hints)}")
        return kind()
    values = {}
    for key, value in raw.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            add_unknown(name, value, problems)
            continue
        try:
            values[key] = _read(hints[key], value, problems, name)
        except _Mismatch:
            problems.add(name, f"{name} = {show(value)}: expected {describe(hints[key])}")
    return kind(**values)


def _read(kind: Any, value: Any, problems: Problems, path: str) -> Any:
    """Return `value` as the type `kind`, or raise `_Mismatch`."""
    if is_dataclass(kind):
        return build(kind, value, problems, path)  # type: ignore[arg-type]
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _read(_without_none(kind), value, problems, path)
    if get_origin(kind) is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in get_args(kind)):
            raise _Mismatch
        return value
    if get_origin(kind) is tuple:
        return _read_tuple(get_args(kind), value, problems, path)
    if kind is float:
        return _read_float(value)
    # `type`, not `isinstance`: in Python a bool is an int.
    if type(value) is not kind:
        raise _Mismatch
    if kind is int and abs(value) > LARGEST:
        raise _Mismatch
    if kind is str and _NO_TEXT.search(value):
        raise _Mismatch
    return value


def _read_tuple(kinds: tuple[Any, ...], value: Any, problems: Problems, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _Mismatch
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _Mismatch
    return tuple(
        _read(kind, item, problems, f"{path}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _read_float(value: Any) -> float:
    """Return `value` as a finite float, or raise `_Mismatch`."""
    # Texts are accepted because YAML 1.1 reads `1e-4`, without a point, as text.
    if type(value) not in (int, float, str):
        raise _Mismatch
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Mismatch from None
    if not math.isfinite(number):
        raise _Mismatch
    return number


def _without_none(kind: Any) -> Any:
    (inner,) = (arg for arg in get_args(kind) if arg is not type(None))
    return inner


def describe(kind: Any) -> str:
    """Return text that describes the values of type `kind`, for messages."""
    if get_origin(kind) in (Union, UnionType):
        return f"{describe(_without_none(kind))}, or null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        if get_origin(first) is Literal:
            return f"a list out of {', '.join(get_args(first))}"
        item = "mappings" if is_dataclass(first) else _PLURALS[first]
        return f"a list of {item}" if rest == [Ellipsis] else f"a list of {1 + len(rest)} {item}"
    return _WORDS[kind]


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text (put quotes around it) without control characters",
}
LARGEST = 2**63 - 1
_NO_TEXT = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f\\ud800-\\udfff]")
"""Control characters and surrogates, refused in text; a NUL byte would end a path."""
_PLURALS = {int: "integers", float: "numbers", str: "texts"}


def show(value: Any) -> str:
    """Return the `repr` of a value, escaped and cut to 80 characters, for messages."""
    # Python refuses the repr of an integer of very many digits.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return "a number of very many digits"
    text = printable(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def known_keys(kind: Any = Config, path: str = "") -> Iterator[str]:
    """Yield every dotted key under `kind`, sections included; `*` stands for a list index."""
    for name, hint in get_type_hints(kind).items():
        key = f"{path}.{name}" if path else name
        yield key
        inner = _without_none(hint) if get_origin(hint) in (Union, UnionType) else hint
        if get_origin(inner) is tuple:
            key += ".*"
            yield key
            inner = get_args(inner)[0]
        if is_dataclass(inner):
            yield from known_keys(inner, key)


def pattern(key: str) -> str:
    """Return a dotted key with list indices replaced by `*`."""
    return ".".join("*" if part.isdecimal() else part for part in key.split("."))


def add_unknown(key: str, value: Any, problems: Problems) -> None:
    """Add the problem of an unknown key, with the nearest known keys."""
    # Looking for similar keys takes milliseconds, too long for a file with thousands of unknown keys.
    names = nearest(key) if len(problems.found) < _EXPLAINED and len(key) < 200 else []
    if len(problems.found) >= _EXPLAINED:
        hint = "see the first ones"
    elif names:
        hint = f"did you mean {' or '.join(names)}?"
    else:
        siblings = [known for known in known_keys() if _parent(known) == _parent(pattern(key))]
        hint = f"keys here are {', '.join(siblings or get_type_hints(Config))}"
    problems.add(key, f"{printable(key)[:200]} = {show(value)}: unknown key; {hint}", *names)


def nearest(key: str) -> list[str]:
    """Return up to two known keys that an unknown `key` may stand for, the likeliest first.

    In order: a very similar name in the same section, the same name in other sections, a similar name in the same
    section, any similar key.
    """
    wanted = pattern(key)
    parent, _, name = wanted.rpartition(".")
    known = [other for other in known_keys() if not wanted.startswith(f"{other}.")]
    beside = [_name(other) for other in known if _parent(other) == parent]

    def close(cutoff: float) -> list[str]:
        matches = difflib.get_close_matches(name, beside, n=1, cutoff=cutoff)
        return [".".join((*key.split(".")[:-1], match)) for match in matches]

    elsewhere = [other for other in known if _name(other) == name != "*"]
    found = close(0.8) + difflib.get_close_matches(wanted, elsewhere, n=2, cutoff=0.0)
    return found[:2] or close(0.6) or difflib.get_close_matches(wanted, known, n=1, cutoff=0.75)


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _parent(key: str) -> str:
    return key.rpartition(".")[0]
