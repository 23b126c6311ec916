"""What the files of one sample say (WebDataset conventions; a file is KEY.extension, the key ends at the first dot).

    KEY.jpg (or .png, .webp, ...) + KEY.txt     a captioned image; a KEY.json beside them is metadata and is ignored
    KEY.txt                                     a text
    KEY.json + KEY.0.png, ...                   a record (`records.py`), as a rule an interleaved document:
        {"items": [{"type": "text", "text": "make it blue", "role": "condition"},
                   {"type": "image", "name": "0.png", "role": "target"}, ...]}

Images of a record are named by their extension. Other files of a sample are ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megabagel.data.documents import Member, SampleError
from megabagel.data.formats.records import Declared, DeclaredImage, DeclaredText, declare, invalid, parse

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"))


def declared_items(files: Mapping[str, Member], read: Callable[[Member], bytes]) -> list[Declared]:
    """The items of the sample whose files are {extension: member}.

    Raises:
        SampleError: what is wrong, with the extension of the file and the field.
    """
    images = [extension for extension in files if extension in IMAGE_EXTENSIONS]
    if len(images) > 1:
        raise SampleError("several images under one key", ", ".join(images))
    if "txt" in files:
        caption = DeclaredText(caption_text(read(files["txt"])), place=files["txt"])
        return [caption, *(DeclaredImage(extension, files[extension]) for extension in images)]
    if "json" in files:
        return _record(files, read)
    raise SampleError("no caption" if images else "neither image nor text", ", ".join(files))


def caption_text(data: bytes) -> str:
    """The text of a caption file: UTF-8, with or without byte order mark, outer white space removed.

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


def _record(files: Mapping[str, Member], read: Callable[[Member], bytes]) -> list[Declared]:
    def locate(where: str, name: Any) -> Member:
        if not isinstance(name, str):
            raise invalid(where, "the extension of a file", name)
        if name.lower() not in files:
            raise SampleError("image of a document is missing", f"{where}: no file with extension {name!r}")
        return files[name.lower()]

    try:
        return declare(parse(read(files["json"])), locate, files["json"])
    except SampleError as error:
        raise SampleError(error.reason, f"json: {error.detail}") from error
