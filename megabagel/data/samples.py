"""What the files of one sample say (WebDataset conventions; a file is KEY.extension, the key ends at the first dot).

    KEY.jpg (or .png, .webp, ...) + KEY.txt     a captioned image; a KEY.json beside them is metadata and is ignored
    KEY.txt                                     a text
    KEY.json + KEY.0.png, ...                   an interleaved document:
        {"items": [{"type": "text", "text": "make it blue", "role": "condition"},
                   {"type": "image", "name": "0.png", "role": "target"}, ...]}

`role` may be left out where the task decides it (`documents.assign_roles`). Other files of a sample are ignored.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from megabagel.data.documents import ImageRole, Member, SampleError, TextRole

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"))

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold half a character, which no encoding can write


@dataclass(frozen=True, slots=True)
class DeclaredText:
    """A text of a sample; `member` is set where the text is a whole file."""

    text: str
    role: TextRole | None = None
    member: Member | None = None


@dataclass(frozen=True, slots=True)
class DeclaredImage:
    """An image of a sample, not looked into yet. `name` is its extension, for messages."""

    name: str
    member: Member
    role: ImageRole | None = None


Declared = DeclaredText | DeclaredImage


def declared_items(files: Mapping[str, Member], read: Callable[[Member], bytes]) -> list[Declared]:
    """The items of the sample whose files are {extension: member}.

    Raises:
        SampleError: what is wrong, with the extension of the file and the field.
    """
    images = [extension for extension in files if extension in IMAGE_EXTENSIONS]
    if len(images) > 1:
        raise SampleError("several images under one key", ", ".join(images))
    if "txt" in files:
        caption = DeclaredText(caption_text(read(files["txt"])), member=files["txt"])
        return [caption, *(DeclaredImage(extension, files[extension]) for extension in images)]
    if "json" in files:
        return _interleaved(read(files["json"]), files)
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


def _interleaved(data: bytes, files: Mapping[str, Member]) -> list[Declared]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("broken JSON", f"json: {error}") from error
    match document:
        case {"items": [_, *_] as entries}:
            return [_item(f"json: items[{number}]", entry, files) for number, entry in enumerate(entries)]
    raise SampleError("invalid document", 'json: expected {"items": [...]} with at least one item')


def _item(where: str, entry: Any, files: Mapping[str, Member]) -> Declared:
    match entry:
        case {"type": "text", "text": str(text), **rest}:
            role = _role(where, rest, get_args(TextRole))
            if not text.strip() or _SURROGATE.search(text):
                raise SampleError("invalid document", f"{where}.text: expected a text, got {text!r:.80}")
            return DeclaredText(text, role)
        case {"type": "image", "name": str(name), **rest}:
            role = _role(where, rest, get_args(ImageRole))
            if name.lower() not in files:
                raise SampleError("image of a document is missing", f"{where}.name: no file with extension {name!r}")
            return DeclaredImage(name, files[name.lower()], role)
    raise SampleError(
        "invalid document",
        f'{where}: expected {{"type": "text", "text": ...}} or {{"type": "image", "name": ...}}, got {entry!r:.80}',
    )


def _role(where: str, rest: Mapping[Any, Any], roles: tuple[str, ...]) -> Any:
    unknown = rest.keys() - {"role"}
    if unknown:
        raise SampleError("invalid document", f"{where}: unknown field {min(unknown)!r}")
    role = rest.get("role")
    if role is not None and role not in roles:
        raise SampleError("invalid document", f"{where}.role: expected one of {', '.join(roles)}, got {role!r}")
    return role
