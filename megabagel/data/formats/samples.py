"""Samples in tar shards: parsing of the files that share a key (WebDataset: the key ends at the first dot of a name).

    KEY.jpg (or .png, .webp, ...) + KEY.txt     a captioned image; a KEY.json beside them is metadata and is ignored
    KEY.txt                                     a text
    KEY.json + KEY.0.png, ...                   a record (`records.py`), as a rule an interleaved document:
        {"items": [{"type": "text", "text": "make it blue", "role": "condition"},
                   {"type": "image", "name": "0.png", "role": "target"}, ...]}

A record names its images by their extensions. A file is an image by its extension or, if that is unknown, by its first
bytes. Unused files are counted by extension.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megabagel.data.documents import Member, SampleError
from megabagel.data.formats.records import (
    MAX_RECORD_BYTES,
    MAX_TEXT_BYTES,
    PAIRS,
    Declared,
    DeclaredImage,
    DeclaredText,
    declare,
    invalid,
    layout_of,
    parse,
)

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"))


_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|BM....\x00\x00|II\*\x00|MM\x00\*|P[456]\s"
    rb"|\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51|....ftyp(?:avif|avis|heic|heix|mif1|msf1|heif)|8BPS|\x00\x00\x01\x00",
    re.DOTALL,
)
"""First bytes of image files. Includes formats that no engine decodes (HEIC, PSD, ICO), so that such a file is reported
as an undecodable image instead of being ignored."""


def looks_like_image(head: bytes) -> bool:
    """Return whether the first 16 bytes of a file are those of an image."""
    return _SIGNATURES.match(head) is not None


def declared_items(
    files: Mapping[str, Member], read: Callable[[Member], bytes], unused: Counter[str] | None = None
) -> list[Declared]:
    """Parse the files of one sample into its items.

    Args:
        files: files of the sample by extension.
        read: reads a file.
        unused: is updated with the extensions of unused files.

    Raises:
        SampleError: the sample is invalid; the message has the extension of the file and the field.
    """
    unused = Counter() if unused is None else unused
    images = [name for name, member in files.items() if _is_image(name, member, read)]
    plain = [name for name in images if "." not in name]
    if "json" in files and "txt" not in files:
        return _record(files, plain, read, unused)
    if len(plain) > 1:
        raise SampleError("several images under one key", ", ".join(plain))
    if "txt" in files:
        if images and not plain:
            raise SampleError("images with unknown names", f"{', '.join(images)}: only a record (json) can name them")
        unused.update(name for name in files if name != "txt" and name not in plain)
        caption = DeclaredText(caption_text(_limited(files["txt"], read, MAX_TEXT_BYTES)), place=files["txt"])
        return [caption, *(DeclaredImage(name, files[name]) for name in plain)]
    dotted = ": the key of a sample ends at the first dot of a name" if any("." in name for name in files) else ""
    raise SampleError("no caption" if plain else "neither image nor text", ", ".join(files) + dotted)


_TEXTS = frozenset(("txt", "json", "cls", "id"))
"""Extensions of texts and labels, which are never images: their first bytes are not read."""


def _is_image(name: str, member: Member, read: Callable[[Member], bytes]) -> bool:
    if name in IMAGE_EXTENSIONS or name in _TEXTS:
        return name in IMAGE_EXTENSIONS
    return looks_like_image(read(replace(member, size=min(member.size, 16))))


def _limited(member: Member, read: Callable[[Member], bytes], most: int) -> bytes:
    if member.size > most:
        raise SampleError("text too long", f"{member.size:,} bytes; at most {most:,} are read")
    return read(member)


def caption_text(data: bytes) -> str:
    """Decode a caption file: UTF-8 with or without byte order mark; surrounding white space is removed.

    Raises:
        SampleError: not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError("caption is not UTF-8", f"byte {error.start} is {data[error.start]:#04x}") from error
    if not text:
        raise SampleError("empty caption")
    return text


def _record(
    files: Mapping[str, Member], images: Sequence[str], read: Callable[[Member], bytes], unused: Counter[str]
) -> list[Declared]:
    """Items of a sample with a record. A caption without an image field belongs to the only image of the sample."""
    named = {"json"}

    def locate(where: str, name: Any) -> Member:
        if not isinstance(name, str):
            raise invalid(where, "the extension of a file", name)
        if name.lower() not in files:
            raise SampleError("image of a document is missing", f"{where}: no file with extension {name!r}")
        named.add(name.lower())
        return files[name.lower()]

    try:
        record = parse(_limited(files["json"], read, MAX_RECORD_BYTES))
        if isinstance(record, dict) and len(images) == 1 and layout_of({*record, "image"}) in PAIRS:
            record = {**record, "image": images[0]}
        found = declare(record, locate, files["json"], unused)
    except SampleError as error:
        raise SampleError(error.reason, f"json: {error.detail}") from error
    unused.update(files.keys() - named)
    return found
