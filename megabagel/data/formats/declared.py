"""Items of a record before they are measured, and the checks of single fields that all layouts share."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megabagel.data.documents import ImageRole, Member, Passage, Place, SampleError, TextRole

MAX_TEXT_BYTES = 2**22
"""Largest text that is used; no context window holds the tokens of a longer one."""

# JSON may contain an unpaired surrogate ("\ud800"), which UTF-8 cannot encode.
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class DeclaredText:
    """A text of a sample; `place` is the location from which it can be read again. Flags as in `documents.TextItem`."""

    text: str
    role: TextRole | None = None
    place: Member | Passage | None = None
    alternative: bool = False
    joined: int = 0


@dataclass(frozen=True, slots=True)
class DeclaredImage:
    """An image of a sample, located but not read. `name` is for messages."""

    name: str
    place: Place
    role: ImageRole | None = None
    frame: bool = False


Declared = DeclaredText | DeclaredImage

Locate = Callable[[str, Any], Place]
"""(field, its value) -> location of the image; raises SampleError that names the field if there is no such image."""


def invalid(where: str, expected: str, value: object) -> SampleError:
    """The error for a field of a wrong type or value: one reason for all, so that they are counted together."""
    return SampleError("invalid record", f"{where}: expected {expected}, got {value!r:.80}".removeprefix(": "))


def list_field(where: str, value: Any) -> Sequence[Any]:
    """A list that is not empty. Raises SampleError for anything else."""
    if not isinstance(value, list) or not value:
        raise invalid(where, "a list that is not empty", value)
    return value


def text_field(where: str, value: Any) -> str:
    """A text that is not blank. Raises SampleError for anything else."""
    if not isinstance(value, str) or not value.strip() or SURROGATE.search(value):
        raise invalid(where, "a text", value)
    if len(value) > MAX_TEXT_BYTES:
        raise SampleError("text too long", f"{where}: {len(value):,} characters; at most {MAX_TEXT_BYTES:,} are read")
    return value


def image_field(where: str, value: Any, locate: Locate, role: ImageRole | None = None) -> DeclaredImage:
    """An image, located by the value of its field.

    Args:
        where: place of the field in its document, for messages.
        value: of the field.
        locate: finds the image.
        role: of the image in a sample; None: by the task.
    """
    place = locate(where, value)
    return DeclaredImage(value if isinstance(value, str) else where, place, role)
