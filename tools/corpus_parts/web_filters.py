"""The rules for web documents that need no model (BAGEL table 2), in the order in which they run.

What table 2 leaves to models has its place in the same row: text density (OCR), relevance (CLIP), trimming (LLM). Of
clarity and relevance the parts that need none are here: a sharpness operator, and pictures that repeat byte by byte.
"""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from corpus_parts.draft import Draft, Picture, Text, joined
from corpus_parts.filters import Filter, by_document, by_picture
from megabagel.data.decode import measure
from megabagel.data.decode.transforms import to_rgb
from megabagel.data.documents import SampleError

INTERFACE_NAMES = re.compile("icon|widget|button|logo|avatar|badge|banner|sprite|spacer|stock-", re.IGNORECASE)
SIDES = (150, 20_000)
"""Pixels."""
ASPECT = (1 / 2, 2)
SHARPNESS = 20.0
"""Least variance of the Laplacian, on grey levels 0 to 255."""
IMAGES = (3, 8)
"""Images of one document."""
COMMON_WORDS = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "in", "is", "it", "of", "on", "or", "that", "the",
    "this", "to", "with", "you",
))  # fmt: skip
COMMON_SHARE = 0.1
"""Least share of common words in an English text."""


@by_picture
def interface_images(picture: Picture) -> bool:
    """UI removal: no icons and the like, by what their names say."""
    return not INTERFACE_NAMES.search(picture.source)


@by_picture
def missing_files(picture: Picture) -> bool:
    """The page's file must be there."""
    return picture.data is not None


@by_picture
def damaged_files(picture: Picture) -> bool:
    """The whole image must decode."""
    return is_sound(picture)


def is_sound(picture: Picture) -> bool:
    """Whether there is an image that decodes to its last row."""
    try:
        measure(picture.data or b"", verify=True)
    except SampleError:
        return False
    return True


@by_picture
def image_sides(picture: Picture) -> bool:
    """Resolution: width and height within [150, 20000]."""
    return all(SIDES[0] <= side <= SIDES[1] for side in _size(picture))


@by_picture
def aspect_ratio(picture: Picture) -> bool:
    """Resolution: width / height within [1/2, 2]."""
    height, width = _size(picture)
    return ASPECT[0] <= width / height <= ASPECT[1]


@by_picture
def image_clarity(picture: Picture) -> bool:
    """Clarity: the variance of the Laplacian is small where an image is blurred or empty."""
    return sharpness(picture.data or b"") >= SHARPNESS


def sharpness(data: bytes) -> float:
    """Variance of the Laplacian (difference to the mean of the four neighbours, times four) on grey levels."""
    grey = np.asarray(to_rgb(Image.open(io.BytesIO(data))).convert("L"), np.float32)
    centre = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre).var())


def repeated_images(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """Relevance: of pictures that are equal byte by byte, a document keeps the first."""
    for draft in drafts:
        items: list[Text | Picture] = []
        seen: set[bytes | None] = set()
        for item in draft.items:
            if isinstance(item, Text) or item.data not in seen:
                items.append(item)
            if isinstance(item, Picture):
                seen.add(item.data)
        yield replace(draft, items=joined(items))


@by_document
def english(draft: Draft) -> bool:
    """English only, by its most common words."""
    words = re.findall(r"[^\W\d_]+", draft.text.lower())
    return bool(words) and sum(word in COMMON_WORDS for word in words) >= COMMON_SHARE * len(words)


@by_document
def too_few_images(draft: Draft) -> bool:
    """Image quantity: at least 3."""
    return len(draft.pictures) >= IMAGES[0]


def long_documents_split(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """Image quantity: a document of more than 8 images becomes parts of 3 to 8, as even as can be."""
    for draft in drafts:
        parts = -(-len(draft.pictures) // IMAGES[1])
        yield from split(draft, parts) if parts > 1 else [draft]


def split(draft: Draft, parts: int) -> Iterator[Draft]:
    """Cut a document into consecutive parts of nearly equal numbers of pictures; no text is lost.

    Between two parts, the first paragraph stays with the picture before it, whose caption it is as a rule; the others
    lead to the next picture. A single paragraph leads to the next.
    """
    total = len(draft.pictures)
    ends = {total * part // parts for part in range(1, parts)}
    found, number, items = 0, 1, list[Text | Picture]()
    for item in draft.items:
        if isinstance(item, Picture):
            found += 1
        if isinstance(item, Text) and found in ends:
            ends.remove(found)
            caption, lead = _at_first_paragraph(item.text)
            yield Draft(f"{draft.key}-{number}", (*items, *caption))
            number, items = number + 1, lead
        elif isinstance(item, Picture) and found - 1 in ends:  # no text between two pictures
            ends.remove(found - 1)
            yield Draft(f"{draft.key}-{number}", tuple(items))
            number, items = number + 1, [item]
        else:
            items.append(item)
    yield Draft(f"{draft.key}-{number}", tuple(items))


def _at_first_paragraph(text: str) -> tuple[list[Text | Picture], list[Text | Picture]]:
    first, gap, rest = text.strip().partition("\n\n")
    return ([Text(first)], [Text(rest)]) if gap else ([], [Text(text)])


def _size(picture: Picture) -> tuple[int, int]:
    """Height and width."""
    return measure(picture.data or b"", verify=False)


WEB_FILTERS: tuple[Filter, ...] = (
    interface_images,
    missing_files,
    damaged_files,
    image_sides,
    aspect_ratio,
    image_clarity,
    repeated_images,
    english,
    too_few_images,
    long_documents_split,
)
