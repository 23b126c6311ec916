import json

import pytest

from megabagel.data.documents import Member, Passage, SampleError
from megabagel.data.formats.records import Declared, DeclaredImage, DeclaredText
from megabagel.data.formats.samples import declared_items


def declare(**contents: bytes) -> list[Declared]:
    """Items of a sample whose files are given as extension=bytes (dots written as underscores)."""
    files = {name.replace("_", "."): Member(0, number, 1) for number, name in enumerate(contents)}
    return declared_items(files, lambda member: list(contents.values())[member.offset])


def document(*items: object) -> bytes:
    return json.dumps({"items": items}).encode()


def test_a_captioned_image_is_text_then_image_with_open_roles() -> None:
    expected = [DeclaredText("a cat", None, Member(0, 1, 1)), DeclaredImage("webp", Member(0, 0, 1))]
    assert declare(webp=b"...", txt=b"\xef\xbb\xbfa cat\n") == expected


def test_metadata_beside_a_caption_is_not_read() -> None:
    assert len(declare(jpg=b"...", txt=b"a cat", json=b"{broken", cls=b"7")) == 2


def test_a_text_alone() -> None:
    assert declare(txt="  Äpfel \n".encode()) == [DeclaredText("Äpfel", None, Member(0, 0, 1))]


def test_an_interleaved_document_keeps_order_text_and_roles() -> None:
    declared = document(
        {"type": "image", "name": "0.PNG", "role": "condition"},
        {"type": "text", "text": " make it blue "},
        {"type": "image", "name": "1.jpg", "role": "look"},
        {"type": "text", "text": "done", "role": "target"},
    )
    assert declare(json=declared, **{"1_jpg": b"", "0_png": b""}) == [
        DeclaredImage("0.PNG", Member(0, 2, 1), "condition"),
        DeclaredText(" make it blue ", place=Passage(Member(0, 0, 1), 0)),
        DeclaredImage("1.jpg", Member(0, 1, 1), "look"),
        DeclaredText("done", "target", Passage(Member(0, 0, 1), 1)),
    ]


TEXT = {"type": "text", "text": "a"}
FAULTS = [
    ({"jpg": b""}, "no caption", "jpg"),
    ({"cls": b"7"}, "neither image nor text", "cls"),
    ({"jpg": b"", "png": b"", "txt": b"a"}, "several images under one key", "jpg, png"),
    ({"jpg": b"", "txt": b" \n"}, "empty caption", ""),
    ({"jpg": b"", "txt": b"caf\xe9"}, "caption is not UTF-8", "byte 3 is 0xe9"),
    ({"json": b'{"items": [' + b"["}, "broken JSON", "json: Expecting value"),
    ({"json": b"\xff\xfe\xfd"}, "broken JSON", "json: "),
    ({"json": b"[" * 100_000}, "broken JSON", "json: "),
    ({"json": b"[]"}, "invalid record", "json: expected an object, got []"),
    ({"json": b'{"items": []}'}, "invalid record", "json: items: expected a list that is not empty, got []"),
    ({"json": b'{"items": "ab"}'}, "invalid record", "json: items: expected a list that is not empty, got 'ab'"),
    (
        {"json": b'{"captions": "ab"}'},
        "unknown layout",
        "json: fields ['captions']; expected one of items, conversations",
    ),
    ({"json": document(TEXT, 7)}, "invalid record", "json: items[1]: expected"),
    ({"json": document({"type": "audio", "name": "0.ogg"})}, "invalid record", "json: items[0]: expected"),
    ({"json": document({"type": "text", "text": 3})}, "invalid record", "json: items[0].text: expected a text, got 3"),
    ({"json": document({"type": "text", "text": " "})}, "invalid record", "json: items[0].text: expected a text"),
    ({"json": document({"type": "text", "text": "\ud800"})}, "invalid record", "json: items[0].text"),
    ({"json": document(TEXT | {"rôle": "target"})}, "invalid record", "json: items[0]: unknown field 'rôle'"),
    (
        {"json": document(TEXT | {"role": "look"})},
        "invalid record",
        "role: expected one of condition, target",
    ),
    ({"json": document(TEXT | {"role": ["target"]})}, "invalid record", "items[0].role: expected one of"),
    (
        {"json": document({"type": "image", "name": "0.png"})},
        "image of a document is missing",
        "items[0].name: no file",
    ),
]


@pytest.mark.parametrize(("contents", "reason", "detail"), FAULTS)
def test_a_fault_names_file_and_field(contents: dict[str, bytes], reason: str, detail: str) -> None:
    with pytest.raises(SampleError) as caught:
        declare(**contents)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
