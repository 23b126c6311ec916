"""What one record of a source says: the layouts that are understood, each checked field by field.

    {"items": [ITEM, ...]}                                      an interleaved document, with
        {"type": "text", "text": "make it blue", "role": "condition"}       or a list of wordings: a visit reads one
        {"type": "image", "name": "0.png", "role": "target"}
        {"type": "video", "frames": ["0.png", "1.png"], "role": "look"}
    {"conversations": [{"from": "human", "value": "<image> What is it?"}, {"from": "gpt", "value": "A cat."}],
     "image": "cat.png"}                                        or a list of images; or "video": a list of frames
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": "A cat."}]}  the same as OpenAI and transformers write it
    {"text": "..."}                                             a text
    {"image": ..., "text": "a cat"}                             a captioned image; also "caption" for the text, and
                                                                "file_name" for the image (HF imagefolder)
    {"image": BYTES, "captions": '{"short": "a cat"}'}          a captioned image; a visit reads one of the captions
    {"image_list": [BYTES, ...], "instruction_list": [["make it blue", ...], ...]}      a chain of edits

Of several layouts whose fields are there, the one that explains most fields is read; fields left over are counted by
name. `captions`, `image_list`, `text` and conversations are the layouts of the released data sets
(docs/bagel.md#data-layouts). `role` may be left out where the task decides it (`documents.assign_roles`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import prod
from typing import Any, get_args

from megabagel.data.documents import Cell, ImageRole, Member, Passage, Place, SampleError, TextRole

MAX_RECORD_BYTES = 2**24
"""A record with more bytes is left out: parsed JSON takes up to 20 times its bytes."""
MAX_TEXT_BYTES = 2**22
"""A text with more bytes is left out; no window of a model holds its tokens."""
MAX_ITEMS = 2**14
"""Texts, wordings and images of one record."""
MAX_WORDINGS = 2**12
"""Wordings of two joined instructions, which multiply."""

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold half a character, which no encoding can write
_PLACEHOLDER = re.compile("(<image>|<video>)")


@dataclass(frozen=True, slots=True)
class DeclaredText:
    """A text of a sample; `place` says where it can be read again. For the flags see `documents.TextItem`."""

    text: str
    role: TextRole | None = None
    place: Member | Passage | None = None
    alternative: bool = False
    joined: int = 0


@dataclass(frozen=True, slots=True)
class DeclaredImage:
    """An image of a sample, not looked into yet. `name` is for messages."""

    name: str
    place: Place
    role: ImageRole | None = None
    frame: bool = False


Declared = DeclaredText | DeclaredImage

Locate = Callable[[str, Any], Place]
"""(field, what stands there) -> where the bytes of the image lie; raises SampleError, with the field, if nowhere."""


def parse(data: bytes) -> Any:
    """The JSON value in `data`.

    Raises:
        SampleError: it is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("broken JSON", str(error)) from error


def layout_of(fields: Collection[str], layouts: Collection[tuple[str, ...]] | None = None) -> tuple[str, ...] | None:
    """The layout that explains most of the fields (of several, the first in the table), None if there is none.

    layouts: those to choose from; default: all.
    """
    there = [layout for layout in (_LAYOUTS if layouts is None else layouts) if all(name in fields for name in layout)]
    return max(there, key=lambda layout: sum(name in fields for name in _fields_of(layout)), default=None)


def named_layouts(layouts: Collection[tuple[str, ...]]) -> str:
    """The layouts for a message, those of captioned images as one."""
    others = ["+".join(layout) for layout in layouts if layout not in PAIRS]
    images, texts = ("/".join(dict.fromkeys(names)) for names in zip(*PAIRS, strict=True))
    return ", ".join([*others, f"{images}+{texts}"])


def left_over(fields: Collection[str], layout: tuple[str, ...]) -> list[str]:
    """The fields that a layout has no use for, in their order."""
    return [name for name in fields if name not in _fields_of(layout)]


def _fields_of(layout: tuple[str, ...]) -> tuple[str, ...]:
    return *layout, *_LAYOUTS[layout][1]


def declare(record: Any, locate: Locate, place: Member | Cell, unused: Counter[str] | None = None) -> list[Declared]:
    """The items of a record, in order; its texts are numbered as its passages.

    Args:
        record: a JSON value.
        locate: finds the images that it names.
        place: where the record lies.
        unused: counts fields for which the record's layout has no use.

    Raises:
        SampleError: what is wrong, with the field, the value and what was expected there.
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
    """Text number `part` of a record that has been declared before."""
    somewhere = Member(0, 0, 0)
    record = {"image": "", **record}  # of a captioned image in a tar, the record may hold the caption alone
    texts = [item for item in declare(record, lambda *_: somewhere, somewhere) if isinstance(item, DeclaredText)]
    return texts[part].text


def invalid(where: str, expected: str, value: object) -> SampleError:
    """One message for every wrong value."""
    return SampleError("invalid record", f"{where}: expected {expected}, got {value!r:.80}".removeprefix(": "))


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
    """Questions are read, answers are learned; images and videos stand where the questions name them."""
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
    """Texts, and the placeholders between them.

    As in the released loader: white space is removed beside a placeholder, and a turn without one is taken as it is.
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
    """Messages as a conversation: those of system and user are read, those of the assistant learned."""
    named: list[Any] = []
    turns = [
        _as_turn(f"messages[{number}]", message, named)
        for number, message in enumerate(_list("messages", record["messages"]))
    ]
    listed = record.get("images") or record.get("image") or []
    images = [name for name in named if name is not None] or listed
    yield from _conversation({"conversations": turns, "image": images, "video": record.get("video")}, locate)


def _as_turn(where: str, message: Any, images: list[Any]) -> dict[str, Any]:
    """A message as a turn of a conversation; images that its parts name are appended to `images`."""
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
    """The text of a part, or the placeholder of its image."""
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
    """Reads a captioned image from the fields `image` and `text`."""

    def read(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
        yield DeclaredText(_text(text, record[text]))
        yield _image(image, record[image], locate)

    return read


def _captioned(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Where no caption has a word, the text is one space, as in the released loader."""
    captions = record["captions"]
    try:
        listed = json.loads(captions)
    except (ValueError, TypeError, RecursionError):
        listed = None
    if isinstance(captions, list) and captions:  # as in COCO
        listed = dict(enumerate(captions))
    if not isinstance(listed, dict):
        raise invalid("captions", "a JSON object of captions", captions)
    for name, caption in listed.items():
        if not isinstance(caption, str) or _SURROGATE.search(caption):
            raise invalid(f"captions[{name!r:.40}]", "a text", caption)
    wordings = [caption for caption in listed.values() if caption.strip()] or [" "]
    for number, wording in enumerate(wordings):
        yield DeclaredText(wording, alternative=number > 0)
    yield _image("image", record["image"], locate)


def _edits(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Between image i and image i + 1: the wordings of step i, then its joined instructions.

    Two steps may be written as one, each instruction followed by ". " (the last by "."). Where the two would end at the
    last image, the released loader writes the first alone, full stop included.
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


# Fields


def _list(where: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise invalid(where, "a list that is not empty", value)
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or _SURROGATE.search(value):
        raise invalid(where, "a text", value)
    if len(value) > MAX_TEXT_BYTES:
        raise SampleError("text too long", f"{where}: {len(value):,} characters; at most {MAX_TEXT_BYTES:,} are read")
    return value


def _image(where: str, value: Any, locate: Locate, role: ImageRole | None = None) -> DeclaredImage:
    place = locate(where, value)
    return DeclaredImage(value if isinstance(value, str) else where, place, role)


PAIRS = tuple(product(("image", "file_name", "image_path"), ("text", "caption", "prompt")))
"""Layouts of a captioned image: the names that data sets have for the image and for its text."""

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
}
"""Fields that a layout must have: how it is read, and the fields that it may have beside."""
