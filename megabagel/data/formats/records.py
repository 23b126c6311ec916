"""Records: parsing of one sample from JSON or from a parquet row, in one of the following layouts.

    {"items": [ITEM, ...]}                                      an interleaved document, with
        {"type": "text", "text": "make it blue", "role": "condition"}       or a list of wordings, one used per visit
        {"type": "image", "name": "0.png", "role": "target"}
        {"type": "video", "frames": ["0.png", "1.png"], "role": "look"}
    {"conversations": [{"from": "human", "value": "<image> What is it?"}, {"from": "gpt", "value": "A cat."}],
     "image": "cat.png"}                                        or a list of images; or "video": a list of frames
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": "A cat."}]}  the same as OpenAI and transformers write it
    {"text": "..."}                                             a text
    {"image": ..., "text": "a cat"}                             a captioned image; also "caption" for the text, and
                                                                "file_name" for the image (HF imagefolder)
    {"image": BYTES, "captions": '{"short": "a cat"}'}          a captioned image; one caption used per visit
    {"image_list": [BYTES, ...], "instruction_list": [["make it blue", ...], ...]}      a chain of edits
    {"image": ..., "prompt": ..., "regions": [...]}             a judged picture; also as released (`judged.py`)

If the fields of several layouts are present, the layout that uses most of the fields is taken; unused fields are
counted by name. `captions`, `image_list`, `text` and conversations are the layouts of the released data sets
(docs/bagel.md#data-layouts). `role` may be omitted if the task determines it (`documents.assign_roles`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice, product
from math import prod
from typing import Any, get_args

from megabagel.data.documents import Cell, ImageRole, Member, Passage, SampleError, TextRole
from megabagel.data.formats.declared import (
    MAX_TEXT_BYTES,
    SURROGATE,
    Declared,
    DeclaredImage,
    DeclaredText,
    Locate,
    invalid,
)
from megabagel.data.formats.declared import image_field as _image
from megabagel.data.formats.declared import list_field as _list
from megabagel.data.formats.declared import text_field as _text
from megabagel.data.formats.judged import OPTIONAL, OWN, RELEASED, judged, judged_as_released

__all__ = [
    "MAX_TEXT_BYTES",
    "Declared",
    "DeclaredImage",
    "DeclaredText",
    "Locate",
    "declare",
    "invalid",
    "layout_of",
    "parse",
    "passage",
]

MAX_RECORD_BYTES = 2**24
"""Largest record that is parsed: parsed JSON takes up to 20 times its bytes."""
MAX_ITEMS = 2**14
"""Most texts (every wording counts) and images of one record."""
MAX_WORDINGS = 2**12
"""Most wordings of two joined instructions: the product of the wordings of each."""

_PLACEHOLDER = re.compile("(<image>|<video>)")


def parse(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        SampleError: `data` is not valid JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("broken JSON", str(error)) from error


def layout_of(fields: Collection[str], layouts: Collection[tuple[str, ...]] | None = None) -> tuple[str, ...] | None:
    """Layout that uses most of the fields (the first in the table on a tie), or None if none matches.

    `layouts`: candidates; default: all layouts.
    """
    there = [layout for layout in (_LAYOUTS if layouts is None else layouts) if all(name in fields for name in layout)]
    return max(there, key=lambda layout: sum(name in fields for name in _fields_of(layout)), default=None)


def named_layouts(layouts: Collection[tuple[str, ...]]) -> str:
    """List of layouts for a message; those of captioned images are merged into one entry."""
    others = ["+".join(layout) for layout in layouts if layout not in PAIRS]
    images, texts = ("/".join(dict.fromkeys(names)) for names in zip(*PAIRS, strict=True))
    return ", ".join([*others, f"{images}+{texts}"])


def left_over(fields: Collection[str], layout: tuple[str, ...]) -> list[str]:
    """Fields that a layout does not use, in their order."""
    return [name for name in fields if name not in _fields_of(layout)]


def _fields_of(layout: tuple[str, ...]) -> tuple[str, ...]:
    return *layout, *_LAYOUTS[layout][1]


def declare(record: Any, locate: Locate, place: Member | Cell, unused: Counter[str] | None = None) -> list[Declared]:
    """Parse a record into its items, in order; every text gets its number in the record (`Passage.part`).

    Args:
        record: a JSON value.
        locate: locates the images that the record names.
        place: location of the record.
        unused: is updated with the fields that the layout does not use.

    Raises:
        SampleError: the record is invalid; the message has the field, the value and the expectation.
    """
    if not isinstance(record, dict):
        raise invalid("", "an object", record)
    layout = layout_of(record)
    if layout is None:
        raise SampleError("unknown layout", f"fields {sorted(record)!r:.80}; expected one of {named_layouts(_LAYOUTS)}")
    read, _ = _LAYOUTS[layout]
    declared = list(islice(read(record, locate), MAX_ITEMS + 1))
    if not declared:
        raise SampleError("empty record")
    if len(declared) > MAX_ITEMS:
        raise SampleError("too many items", f"a record has at most {MAX_ITEMS:,} texts and images")
    if unused is not None:
        unused.update(name for name in left_over(record, layout) if record[name] is not None)
    parts = iter(range(len(declared)))
    return [
        replace(item, place=Passage(place, next(parts))) if isinstance(item, DeclaredText) else item
        for item in declared
    ]


def passage(record: Any, part: int) -> str:
    """Text number `part` of a record that was parsed at indexing time."""
    somewhere = Member(0, 0, 0)
    # For a captioned image in a tar the record may hold the caption alone; its layout needs the field `image` too.
    record = {"image": "", **record}
    texts = [item for item in declare(record, lambda *_: somewhere, somewhere) if isinstance(item, DeclaredText)]
    return texts[part].text


# Interleaved documents


def _interleaved(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    for number, entry in enumerate(_list("items", record["items"])):
        yield from _item(f"items[{number}]", entry, locate)


def _item(where: str, entry: Any, locate: Locate) -> Iterator[Declared]:
    match entry:
        case {"type": "text", "text": wording, **rest}:
            role = _role(where, rest, get_args(TextRole))
            listed = isinstance(wording, list)
            for number, text in enumerate(_list(f"{where}.text", wording) if listed else [wording]):
                at = f"{where}.text[{number}]" if listed else f"{where}.text"
                yield DeclaredText(_text(at, text), role, alternative=number > 0)
        case {"type": "image", "name": name, **rest}:
            role = _role(where, rest, get_args(ImageRole))
            yield _image(f"{where}.name", name, locate, role)
        case {"type": "video", "frames": frames, **rest}:
            role = _role(where, rest, ("target", "look"))
            yield from _clip(f"{where}.frames", frames, locate, role)
        case _:
            expected = (
                '{"type": "text", "text": ...}, {"type": "image", "name": ...} or {"type": "video", "frames": [...]}'
            )
            raise invalid(where, expected, entry)


def _role(where: str, rest: Mapping[Any, Any], roles: tuple[str, ...]) -> Any:
    unknown = rest.keys() - {"role"}
    if unknown:
        raise SampleError("invalid record", f"{where}: unknown field {min(unknown)!r}")
    role = rest.get("role")
    if role is not None and role not in roles:
        raise invalid(f"{where}.role", f"one of {', '.join(roles)}", role)
    return role


def _clip(where: str, frames: Any, locate: Locate, role: ImageRole | None) -> Iterator[DeclaredImage]:
    if isinstance(frames, str):
        raise invalid(where, "a list of frames (video files are not decoded: write the frames as images)", frames)
    for number, name in enumerate(_list(where, frames)):
        yield replace(_image(f"{where}[{number}]", name, locate, role), frame=number > 0)


# Conversations


def _conversation(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Items of a conversation: questions are conditions, answers targets, images and videos at their placeholders."""
    images = record.get("image") or []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list):
        raise invalid("image", "a path or a list of paths", images)
    waiting: dict[str, list[list[DeclaredImage]]] = {
        "<image>": [[_image(f"image[{n}]", name, locate, "look")] for n, name in enumerate(names)],
        "<video>": [list(_clip("video", record["video"], locate, "look"))] if record.get("video") else [],
    }
    turns = _list("conversations", record["conversations"])
    pieces = [piece for number, turn in enumerate(turns) for piece in _turn(f"conversations[{number}]", turn)]
    for placeholder, shown in waiting.items():
        asked = sum(piece == placeholder for piece in pieces)
        if asked != len(shown):
            raise SampleError("placeholders do not match", f"{asked} x {placeholder} in questions for {len(shown)}")
    if pieces and not any(isinstance(piece, DeclaredText) and piece.role == "target" for piece in pieces):
        raise SampleError("no answer to learn", f"none of {len(turns)} turns is from gpt")
    for piece in pieces:
        if isinstance(piece, DeclaredText):
            yield piece
        else:
            yield from waiting[piece].pop(0)


def _turn(where: str, turn: Any) -> Iterator[str | DeclaredText]:
    """Texts of a turn, and the placeholders between them.

    As in the released loader, white space next to a placeholder is removed, and a turn without one is kept unchanged.
    """
    match turn:
        case {"from": "human", "value": str(value)} if value.strip() and not _PLACEHOLDER.search(value):
            yield DeclaredText(_text(f"{where}.value", value), "condition")
        case {"from": "human", "value": str(value)}:
            for piece in _PLACEHOLDER.split(value):
                if _PLACEHOLDER.fullmatch(piece):
                    yield piece
                elif piece.strip():
                    yield DeclaredText(_text(f"{where}.value", piece.strip()), "condition")
        case {"from": "gpt", "value": value}:
            yield DeclaredText(_text(f"{where}.value", value), "target")
        case _:
            raise invalid(where, '{"from": "human" or "gpt", "value": a text}', turn)


def _messages(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Items of chat messages, parsed as a conversation: assistant messages are targets, all others conditions."""
    named: list[Any] = []
    turns = [
        _as_turn(f"messages[{number}]", message, named)
        for number, message in enumerate(_list("messages", record["messages"]))
    ]
    listed = record.get("images") or record.get("image") or []
    images = [name for name in named if name is not None] or listed
    yield from _conversation({"conversations": turns, "image": images, "video": record.get("video")}, locate)


def _as_turn(where: str, message: Any, images: list[Any]) -> dict[str, Any]:
    """Convert a message to a turn of a conversation; append the images that its parts name to `images`."""
    match message:
        case {"role": "assistant", "content": str(text)} | {
            "role": "assistant",
            "content": [{"type": "text", "text": str(text)}],
        }:
            return {"from": "gpt", "value": text}
        case {"role": "system" | "user", "content": str(text)}:
            return {"from": "human", "value": text}
        case {"role": "system" | "user", "content": [*parts]}:
            return {"from": "human", "value": "".join(_part(f"{where}.content", part, images) for part in parts)}
    raise invalid(where, '{"role": "system", "user" or "assistant", "content": a text or a list of parts}', message)


def _part(where: str, part: Any, images: list[Any]) -> str:
    """Text of a message part, or the placeholder of its image."""
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": {"url": str(name)}} | {"type": "image_url", "image_url": str(name)}:
            images.append(name)
        case {"type": "image", **rest}:
            images.append(rest.get("image", rest.get("path")))
        case _:
            raise invalid(where, '{"type": "text", ...}, {"type": "image", ...} or {"type": "image_url", ...}', part)
    return "<image>"


# Texts, captioned images, chains of edits


def _plain(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    yield DeclaredText(_text("text", record["text"]))


def _pair(image: str, text: str) -> Callable[[Mapping[str, Any], Locate], Iterator[Declared]]:
    """Return a parser of captioned images with the given field names."""

    def read(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
        yield DeclaredText(_text(text, record[text]))
        yield _image(image, record[image], locate)

    return read


def _captioned(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Items of an image with several captions. If all captions are blank, the text is one space, as released."""
    captions = record["captions"]
    try:
        listed = json.loads(captions)
    except (ValueError, TypeError, RecursionError):
        listed = None
    # A plain list of captions, as in COCO.
    if isinstance(captions, list) and captions:
        listed = dict(enumerate(captions))
    if not isinstance(listed, dict):
        raise invalid("captions", "a JSON object of captions", captions)
    for name, caption in listed.items():
        if not isinstance(caption, str) or SURROGATE.search(caption):
            raise invalid(f"captions[{name!r:.40}]", "a text", caption)
    wordings = [caption for caption in listed.values() if caption.strip()] or [" "]
    for number, wording in enumerate(wordings):
        yield DeclaredText(wording, alternative=number > 0)
    yield _image("image", record["image"], locate)


def _edits(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Items of a chain of edits. Between image i and i + 1: the wordings of step i, then its joined instructions.

    A joined instruction merges two steps, each followed by ". " (the last by "."). If the second step would end at the
    last image, it has the first step alone, full stop included, as in the released loader.
    """
    images = _list("image_list", record["image_list"])
    steps = _list("instruction_list", record["instruction_list"])
    if len(images) != len(steps) + 1:
        raise invalid("instruction_list", f"{len(images) - 1} steps for {len(images)} images", steps)
    wordings = [
        [_text(f"instruction_list[{i}][{n}]", text) for n, text in enumerate(_list(f"instruction_list[{i}]", step))]
        for i, step in enumerate(steps)
    ]
    for i, image in enumerate(images):
        yield _image(f"image_list[{i}]", image, locate)
        if i < len(steps):
            yield from (DeclaredText(text, alternative=n > 0) for n, text in enumerate(wordings[i]))
        if i + 2 < len(images):
            joined = 2 if i + 3 < len(images) else 1
            if prod(map(len, wordings[i : i + joined])) > MAX_WORDINGS:
                raise SampleError("too many wordings", f"instruction_list[{i}] and the next make over {MAX_WORDINGS:,}")
            for n, texts in enumerate(product(*wordings[i : i + joined])):
                text = "".join(f"{text}. " for text in texts).rstrip()
                yield DeclaredText(text, alternative=n > 0, joined=joined)


PAIRS = tuple(product(("image", "file_name", "image_path"), ("text", "caption", "prompt")))
"""Layouts of a captioned image: field names that data sets use for the image and for its text."""

_LAYOUTS: Mapping[
    tuple[str, ...], tuple[Callable[[Mapping[str, Any], Locate], Iterator[Declared]], tuple[str, ...]]
] = {
    ("items",): (_interleaved, ()),
    ("conversations",): (_conversation, ("image", "video")),
    ("image", "captions"): (_captioned, ()),
    ("image_list", "instruction_list"): (_edits, ()),
    ("text",): (_plain, ()),
    ("messages",): (_messages, ("images", "image", "video")),
    **{pair: (_pair(*pair), ()) for pair in PAIRS},
    OWN: (judged, OPTIONAL),
    RELEASED: (judged_as_released, ()),
}
"""By required fields of a layout: its parser, and its optional fields."""
