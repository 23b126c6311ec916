"""A document on its way into a corpus: texts and pictures in reading order.

Texts keep the white space at their ends (a space, or a line break where a paragraph ends), so that two texts read on as
one when the picture between them is left out.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Text:
    """A run of text between two pictures: paragraphs are separated by an empty line."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image as its page names it; `data` is the file, None where there is no such file."""

    source: str
    data: bytes | None


@dataclass(frozen=True)
class Draft:
    """A document. `key` names it in its shard: no dots, short, plain ASCII."""

    key: str
    items: tuple[Text | Picture, ...]

    @property
    def pictures(self) -> list[Picture]:
        """The pictures, in order."""
        return [item for item in self.items if isinstance(item, Picture)]

    @property
    def text(self) -> str:
        """All text, as if there were no pictures."""
        return "".join(item.text for item in self.keeping(lambda picture: False).items).strip()

    def keeping(self, keep: Callable[[Picture], bool]) -> "Draft":
        """The document without the pictures that `keep` refuses."""
        return replace(self, items=joined(item for item in self.items if isinstance(item, Text) or keep(item)))


def joined(items: Iterable[Text | Picture]) -> tuple[Text | Picture, ...]:
    """Items in which texts that have become neighbours are one."""
    result: list[Text | Picture] = []
    for item in items:
        if isinstance(item, Text) and result and isinstance(result[-1], Text):
            before = result.pop().text
            item = Text(tidy(before + (item.text.lstrip(" ") if before[-1:].isspace() else item.text)))
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
