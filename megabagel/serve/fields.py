"""Typed reading of a request's fields. Every refusal names the field, the value found and what was expected."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megabagel.serve.errors import ApiError

_SHOWN = 80
"""Characters of a wrong value that a message repeats."""


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a JSON body holds. Raises ApiError for anything else, NaN and infinities included."""

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"the body is not JSON ({reason}); expected an object", "invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {_shown(found)}; expected a JSON object", "invalid_json")
    return found


class Fields:
    """Fields of one object; each is taken once, and what nobody took is refused.

    Args:
        given: names and values.
        textual: whether numbers and flags come as texts, as in a form.
        where: prefix of names in messages, such as `messages[0].`.
    """

    def __init__(self, given: Mapping[str, Any], textual: bool = False, where: str = "") -> None:
        self._left, self._textual, self._where = dict(given), textual, where

    def raw(self, name: str) -> Any:
        """The value as it came; None if it is absent or null."""
        return self._left.pop(name, None)

    def wrong(self, name: str, value: Any, expected: str, code: str = "invalid_value") -> ApiError:
        """The error about a field.

        Args:
            name: of the field.
            value: as it came.
            expected: what would be right, for the message.
            code: OpenAI's code of the error.
        """
        place = self._where + name
        return ApiError(400, f"{place}={_shown(value)}: expected {expected}", code, place)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A text that can be encoded as UTF-8."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return self.clean(name, value)

    def clean(self, name: str, value: str) -> str:
        """The text itself. Raises ApiError for a lone surrogate, which JSON can hold and UTF-8 cannot."""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.wrong(name, value, "valid Unicode; it holds half of a surrogate pair") from error
        return value

    def required(self, name: str) -> str:
        """A text that has to be there and to hold more than blanks."""
        value = self.text(name)
        if value is None or not value.strip():
            code = "missing_required_parameter" if value is None else "invalid_value"
            raise self.wrong(name, value, "a text", code)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number. Raises ApiError.

        Args:
            name: of the field.
            default: for an absent or null field.
            low: least value.
            high: largest value.
        """
        value = self.raw(name)
        if value is None:
            return default
        found = value
        if self._textual and isinstance(value, str) and value.strip().lstrip("-").isdecimal() and len(value) < 20:
            found = int(value)
        if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
            raise self.wrong(name, value, f"an integer from {low} to {high}")
        return found

    def number(self, name: str, default: float | None, low: float, high: float) -> float | None:
        """A number. Raises ApiError.

        Args:
            name: of the field.
            default: for an absent or null field.
            low: least value.
            high: largest value.
        """
        value = self.raw(name)
        if value is None:
            return default
        found = value
        if self._textual and isinstance(value, str):
            try:
                found = float(value)
            except ValueError:
                found = None
        if isinstance(found, bool) or not isinstance(found, int | float) or not low <= found <= high:
            raise self.wrong(name, value, f"a number from {low:g} to {high:g}")
        assert math.isfinite(found)
        return float(found)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(name)
        if value is None:
            return default
        found = {"true": True, "false": False}.get(value) if self._textual and isinstance(value, str) else value
        if not isinstance(found, bool):
            raise self.wrong(name, value, "true or false")
        return found

    def choice(self, name: str, options: Sequence[str], default: str | None = None) -> str | None:
        """One of several texts."""
        value = self.text(name, default)
        if value is not None and value not in options:
            raise self.wrong(name, value, f"one of {', '.join(options)}", "unsupported_value")
        return value

    def only(self, name: str, *values: Any) -> None:
        """Accept a field of OpenAI's at the values that change nothing here; refuse the others."""
        value = self.raw(name)
        if value is not None and not any(value == x and type(value) is type(x) for x in values):
            raise self.wrong(
                name, value, f"{' or '.join(map(json.dumps, values))}, or no such field", "unsupported_value"
            )

    def ignore(self, *names: str) -> None:
        """Drop fields that are about the caller, not about the result."""
        for name in names:
            self.raw(name)

    def finish(self) -> None:
        """Raise ApiError if a field is left: a misspelt setting would be lost silently."""
        left = [name for name, value in self._left.items() if value is not None]
        if left:
            place = self._where + str(left[0])
            raise ApiError(400, f"{_shown(place)}: no such field here (docs/serving.md)", "unknown_parameter", place)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
