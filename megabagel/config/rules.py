"""Rules between config fields: a reason, the keys that it reads, and a check that yields how to correct a violation.

`@rule(keys)` turns a check function into a `Rule`; the docstring of the function is the reason shown to the user.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from megabagel.config.schema import Config
from megabagel.config.typed import show

Check = Callable[[Config], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """One rule. Its message is: the keys with their values, the reason, the next step that the check yields."""

    name: str
    why: str
    """One sentence, shown to the user."""
    keys: tuple[str, ...]
    """Dotted keys that the check reads; `*` stands for every entry of a list."""
    check: Check
    """Yields one next step per violation."""

    def messages(self, config: Config) -> Iterator[str]:
        """Return one line per violation."""
        # A key with `*` has no single value; the check names the entry of the list in its own text.
        named = [f"{key} = {show(value_at(config, key))}" for key in self.keys if "*" not in key]
        opening = f"{', '.join(named)}: " if named else ""
        return (f"{opening}{self.why} {text}" for text in self.check(config))


def rule(*keys: str) -> Callable[[Check], Rule]:
    """Return a decorator that makes a rule of a check that reads `keys`; its docstring is the reason for the user."""
    return lambda check: Rule(check.__name__, " ".join((check.__doc__ or "").split()), keys, check)


def value_at(config: Config, key: str) -> Any:
    """Return the value at a dotted key without indices."""
    return reduce(getattr, key.split("."), config)


def multiple_of(config: Config, whole: str, part: str) -> Iterator[str]:
    """Yield the nearest legal values if the value at key `whole` is not a multiple of the value at key `part`."""
    value, unit = value_at(config, whole), value_at(config, part)
    if value % unit:
        small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
        smaller = max(d for d in [*small, *(value // d for d in small)] if d < unit)
        yield f"Set {whole} to {nearest_multiples(value, unit)}, or {part} to {smaller}."


def nearest_multiples(value: int, unit: int) -> str:
    """Return text with the nearest positive multiples of `unit` below and above `value`."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
