"""A document on its way into a corpus: texts, pictures and clips in reading order.

Texts keep the white space at their ends (a space, or a line break where a paragraph ends), so that two texts read on as
one when the picture between them is left out.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Text:
    """A run of text between two pictures: paragraphs are separated by an empty line."""

    text: str
    role: str = ""
    """Role in training (`data.documents.TextRole`); empty: the default of the layout that is written."""


@dataclass(frozen=True)
class Picture:
    """An image as its page names it."""

    source: str
    data: bytes | None
    """The image file; None where it does not exist."""
    alt: str = ""
    """Text that the page gives for it."""
    role: str = ""
    """Role in training (`data.documents.ImageRole`); empty: the default of the layout that is written."""
    frame: bool = False
    """Follows the picture before it in time: both are frames of one clip."""


@dataclass(frozen=True)
class Clip:
    """A part of a video file, decoded by the steps that need its frames."""

    path: str
    first: int
    """Number of its first frame."""
    last: int
    """Number of the frame after its last."""
    fps: float
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of what is kept of each frame."""

    @property
    def seconds(self) -> float:
        """Length."""
        return (self.last - self.first) / self.fps


Item = Text | Picture | Clip


@dataclass(frozen=True)
class Draft:
    """A document on its way through the steps of a recipe."""

    key: str
    """Name in its shard: no dots, short, plain ASCII."""
    items: tuple[Item, ...]
    source: str = ""
    """File or address that it was read from."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that steps found out, such as language and topic; part of the provenance."""
    notes: tuple[str, ...] = ()
    """Changes that steps made, in order; part of the provenance."""

    def noted(self, note: str, **meta: Any) -> "Draft":
        """The document with one more note and values."""
        return replace(self, notes=(*self.notes, note), meta={**self.meta, **meta})

    @property
    def pictures(self) -> list[Picture]:
        """The pictures, in order."""
        return [item for item in self.items if isinstance(item, Picture)]

    @property
    def text(self) -> str:
        """All text, as if there were no pictures."""
        kept = joined(item for item in self.items if isinstance(item, Text))
        return "".join(item.text for item in kept if isinstance(item, Text)).strip()

    @property
    def clips(self) -> list[Clip]:
        """The clips, in order."""
        return [item for item in self.items if isinstance(item, Clip)]

    def keeping(self, keep: Callable[[Picture], bool]) -> "Draft":
        """The document without the pictures that `keep` refuses."""
        return replace(self, items=joined(x for x in self.items if not isinstance(x, Picture) or keep(x)))


def joined(items: Iterable[Item]) -> tuple[Item, ...]:
    """Items in which texts of one role that have become neighbours are one."""
    result: list[Item] = []
    for item in items:
        before = result[-1] if result else None
        if isinstance(item, Text) and isinstance(before, Text) and before.role == item.role:
            result.pop()
            after = item.text.lstrip(" ") if before.text[-1:].isspace() else item.text
            item = replace(item, text=tidy(before.text + after))
        result.append(item)
    return tuple(result)


def tidy(text: str) -> str:
    """Runs of empty lines become one, white space before a line break goes."""
    return re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", re.sub(r"[ \t]+\n", "\n", text))


def plain_key(name: str) -> str:
    """A name as part of a key.

    >>> plain_key("Über uns.v2")
    '_ber_uns_v2'
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
