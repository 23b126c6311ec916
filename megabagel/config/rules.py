"""What a rule between fields is: a reason, the keys it reads, and a check that says how to mend what it finds."""

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
    """One rule. Its message is: the keys with their values, the reason, and the text that the check yields."""

    name: str
    why: str
    """One sentence, shown to the user."""
    keys: tuple[str, ...]
    """Dotted keys that the check reads; `*` stands for every entry of a list."""
    check: Check
    """Yields one next step for each thing wrong."""

    def messages(self, config: Config) -> Iterator[str]:
        """Yield one line for each thing wrong. Entries of lists are named by the check itself."""
        named = [f"{key} = {show(value_at(config, key))}" for key in self.keys if "*" not in key]
        opening = f"{', '.join(named)}: " if named else ""
        return (f"{opening}{self.why} {text}" for text in self.check(config))


def rule(*keys: str) -> Callable[[Check], Rule]:
    """Make a rule out of a check that reads `keys`; its docstring is the reason shown to the user."""
    return lambda check: Rule(check.__name__, " ".join((check.__doc__ or "").split()), keys, check)


def value_at(config: Config, key: str) -> Any:
    """Return the value at a dotted key without indices."""
    return reduce(getattr, key.split("."), config)


def multiple_of(config: Config, whole: str, part: str) -> Iterator[str]:
    """Yield the nearest legal values unless the value at key `whole` is a multiple of the one at key `part`."""
    value, unit = value_at(config, whole), value_at(config, part)
    if value % unit:
        small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
        smaller = max(d for d in [*small, *(value // d for d in small)] if d < unit)
        yield f"Set {whole} to {nearest_multiples(value, unit)}, or {part} to {smaller}."


def nearest_multiples(value: int, unit: int) -> str:
    """Name the nearest positive multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
