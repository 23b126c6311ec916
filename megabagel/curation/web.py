"""Rules on pictures of web pages (BAGEL table 2), and the language and length of their documents.

Thresholds are the paper's where it gives one. Steps that need all documents are in `repeats.py` and `topics.py`, those
that write text in `rewrite.py`.
"""

import io
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from megabagel.curation.draft import Draft, Item, Picture, Text
from megabagel.curation.measure import texts
from megabagel.curation.measure.look import look
from megabagel.curation.measure.pictures import clarity, text_density
from megabagel.curation.steps import Context, by_document, by_picture, step, without_pictures
from megabagel.data.decode import measure
from megabagel.data.decode.transforms import to_rgb
from megabagel.data.documents import SampleError
from megabagel.errors import UserError

INTERFACE_NAMES = "icon|widget|button|logo|avatar|badge|banner|sprite|spacer|stock-"
COMMON_SHARE = 0.1
"""Least share of a language's common words in a text of that language."""


@by_picture
def interface_images(picture: Picture, *, names: str = INTERFACE_NAMES) -> str | None:
    """UI removal: no icons and the like, by a regular expression on their names. The paper: icon, widget."""
    return "name of an interface image" if re.search(names, picture.source, re.IGNORECASE) else None


@by_picture
def missing_files(picture: Picture) -> str | None:
    """The page's file must exist."""
    return "no such file" if picture.data is None else None


@by_picture
def damaged_files(picture: Picture) -> str | None:
    """The whole image must decode."""
    try:
        look(picture.data or b"")
    except SampleError as error:
        return error.reason
    return None


def is_sound(picture: Picture) -> bool:
    """Whether there is an image that decodes to its last row."""
    try:
        measure(picture.data or b"", verify=True)
    except SampleError:
        return False
    return True


@by_picture
def image_sides(picture: Picture, *, least: int = 150, most: int = 20_000) -> str | None:
    """Resolution: width and height in pixels within the paper's [150, 20000]."""
    sides = _size(picture)
    if min(sides) < least:
        return f"a side below {least}"
    return f"a side above {most}" if max(sides) > most else None


@by_picture
def aspect_ratio(picture: Picture, *, least: float = 1 / 2, most: float = 2.0) -> str | None:
    """Resolution: width / height within the paper's [1/2, 2]."""
    height, width = _size(picture)
    return None if least <= width / height <= most else "aspect ratio"


@by_picture
def image_clarity(picture: Picture, *, least: float = 20.0, side: int = 512) -> str | None:
    """Clarity: variance of the Laplacian of the image at a longest side of `side` pixels (0: of the whole image)."""
    data = picture.data or b""
    found = clarity(look(data).grey, side) if side else sharpness(data)
    return "blurred or empty" if found < least else None


def sharpness(data: bytes) -> float:
    """Variance of the Laplacian of the whole image in its own size."""
    return clarity(np.asarray(to_rgb(Image.open(io.BytesIO(data))).convert("L")))


@by_picture
def printed_text(picture: Picture, *, most: float = 0.2, words: int = 100, by: str = "classical") -> str | None:
    """Text density: the paper drops pictures of more than 100 OCR tokens.

    `by: classical` drops those of which more than `most` of all blocks look like print; `by: tesseract` counts `words`.
    """
    if by == "classical":
        dense = text_density(look(picture.data or b"").grey) > most
    elif by == "tesseract":
        dense = _ocr_words(picture.data or b"") > words
    else:
        raise UserError(f"printed_text.by: {by!r}; expected classical or tesseract")
    return "mostly printed text" if dense else None


def _ocr_words(data: bytes) -> int:
    if shutil.which("tesseract") is None:
        raise UserError("printed_text.by: tesseract is not installed; install it (tesseract-ocr), or use classical")
    done = subprocess.run(["tesseract", "-", "-"], input=data, capture_output=True, check=False, timeout=120)
    return len(done.stdout.split())


@step
def repeated_images(drafts: Iterable[Draft], context: Context) -> Iterator[Draft]:
    """Relevance: of pictures that are equal byte by byte, a document keeps the first."""
    for draft in drafts:
        seen: set[bytes | None] = set()
        reasons: list[str | None] = []
        for picture in draft.pictures:
            reasons.append("repeated in its document" if picture.data in seen else None)
            seen.add(picture.data)
        yield without_pictures(draft, context, "repeated_images", reasons)


@by_document
def english(draft: Draft) -> str | None:
    """English only, by its most common words."""
    words = re.findall(r"[^\W\d_]+", draft.text.lower())
    common = sum(word in ENGLISH for word in words)
    return None if words and common >= COMMON_SHARE * len(words) else "not English"


ENGLISH = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "in", "is", "it", "of", "on", "or", "that", "the",
    "this", "to", "with", "you",
))  # fmt: skip


@step
def language(
    drafts: Iterable[Draft], context: Context, *, keep: Sequence[str] = ("en",), least: float = COMMON_SHARE
) -> Iterator[Draft]:
    """Keep documents in these languages (codes such as en), told by script and common words; [] keeps and notes all."""
    for draft in drafts:
        found = texts.language(draft.text, least)
        if keep and found not in keep:
            context.drop(draft, f"language {found}" if found else "language unknown")
        else:
            yield replace(draft, meta={**draft.meta, "language": found})


@by_document
def too_few_words(draft: Draft, *, least: int = 50) -> str | None:
    """A document whose text is kept has some."""
    return "too few words" if len(draft.text.split()) < least else None


@by_document
def too_few_images(draft: Draft, *, least: int = 3) -> str | None:
    """Image quantity: at least 3."""
    return "too few images" if len(draft.pictures) < least else None


@step
def long_documents_split(drafts: Iterable[Draft], context: Context, *, most: int = 8) -> Iterator[Draft]:
    """Image quantity: a document of more than 8 images becomes parts of 3 to 8, as even as can be."""
    for draft in drafts:
        parts = -(-len(draft.pictures) // most)
        if parts > 1:
            context.added(documents=parts - 1)
            yield from (part.noted(f"long_documents_split: one of {parts} parts") for part in split(draft, parts))
        else:
            yield draft


def split(draft: Draft, parts: int) -> Iterator[Draft]:
    """Cut a document into consecutive parts of nearly equal numbers of pictures; no text is lost.

    Between two parts, the first paragraph stays with the picture before it, whose caption it is as a rule; the others
    lead to the next picture. A single paragraph leads to the next.
    """
    total = len(draft.pictures)
    ends = {total * part // parts for part in range(1, parts)}
    found, number, items = 0, 1, list[Item]()
    for item in draft.items:
        if isinstance(item, Picture):
            found += 1
        if isinstance(item, Text) and found in ends:
            ends.remove(found)
            caption, lead = _at_first_paragraph(item.text)
            yield replace(draft, key=f"{draft.key}-{number}", items=(*items, *caption))
            number, items = number + 1, lead
        elif isinstance(item, Picture) and found - 1 in ends:  # no text between two pictures
            ends.remove(found - 1)
            yield replace(draft, key=f"{draft.key}-{number}", items=tuple(items))
            number, items = number + 1, [item]
        else:
            items.append(item)
    yield replace(draft, key=f"{draft.key}-{number}", items=tuple(items))


def _at_first_paragraph(text: str) -> tuple[list[Item], list[Item]]:
    first, gap, rest = text.strip().partition("\n\n")
    return ([Text(first)], [Text(rest)]) if gap else ([], [Text(text)])


def _size(picture: Picture) -> tuple[int, int]:
    """Height and width."""
    return measure(picture.data or b"", verify=False)
