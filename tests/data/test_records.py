"""Every layout of a record: its exact items, and one wrong value of every field."""

import json
from typing import Any

import pytest

from megabagel.data.documents import Loose, Member, Passage, SampleError
from megabagel.data.formats.records import Declared, DeclaredImage, DeclaredText, declare, invalid, parse, passage

HERE = Member(3, 40, 50)


def locate(where: str, name: Any) -> Loose:
    if not isinstance(name, str):
        raise invalid(where, "a path", name)
    return Loose(name, len(name))


def text(part: int, words: str, role: Any = None, *, alternative: bool = False, joined: int = 0) -> DeclaredText:
    return DeclaredText(words, role, Passage(HERE, part), alternative, joined)


def image(name: str, role: Any = None, *, frame: bool = False) -> DeclaredImage:
    return DeclaredImage(name, Loose(name, len(name)), role, frame)


ITEMS: dict[str, tuple[dict[str, Any], list[Declared]]] = {
    "a text": ({"text": " Äpfel\n"}, [text(0, " Äpfel\n")]),
    "wordings and a clip": (
        {
            "items": [
                {"type": "text", "text": ["go", "walk"], "role": "condition"},
                {"type": "video", "frames": ["0.png", "1.png", "2.png"], "role": "target"},
                {"type": "image", "name": "3.png", "role": "look"},
                {"type": "text", "text": "so", "role": "target"},
            ],
            "source": "ignored",
        },
        [
            text(0, "go", "condition"),
            text(1, "walk", "condition", alternative=True),
            image("0.png", "target"),
            image("1.png", "target", frame=True),
            image("2.png", "target", frame=True),
            image("3.png", "look"),
            text(2, "so", "target"),
        ],
    ),
    "a conversation": (
        {
            "id": 7,
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "Compare \n<image> with<image>"},
                {"from": "gpt", "value": " the <image> is larger "},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Seen."},
            ],
        },
        [
            text(0, "Compare", "condition"),
            image("a.png", "look"),
            text(1, "with", "condition"),
            image("b.png", "look"),
            text(2, " the <image> is larger ", "target"),
            text(3, "Why?", "condition"),
            text(4, "Seen.", "target"),
        ],
    ),
    "a conversation about one image and a video": (
        {
            "image": "a.png",
            "video": ["f0.png", "f1.png"],
            "conversations": [
                {"from": "human", "value": "<video> and <image>"},
                {"from": "gpt", "value": "yes"},
            ],
        },
        [
            image("f0.png", "look"),
            image("f1.png", "look", frame=True),
            text(0, "and", "condition"),
            image("a.png", "look"),
            text(1, "yes", "target"),
        ],
    ),
    "a conversation of words": (
        {"image": "", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [text(0, "a", "condition"), text(1, "b", "target")],
    ),
    "captions": (
        {"image": "i", "captions": json.dumps({"short": "a cat", "blank": " ", "long": " the cat "})},
        [text(0, "a cat"), text(1, " the cat ", alternative=True), image("i")],
    ),
    "no caption": ({"image": "i", "captions": "{}"}, [text(0, " "), image("i")]),
    "blank captions": ({"image": "i", "captions": '{"a": ""}'}, [text(0, " "), image("i")]),
    "one edit": (
        {"image_list": ["i0", "i1"], "instruction_list": [["a", "b"]]},
        [image("i0"), text(0, "a"), text(1, "b", alternative=True), image("i1")],
    ),
    "two edits: the first may stand alone with a full stop": (
        {"image_list": ["i0", "i1", "i2"], "instruction_list": [["a", "b "], ["c"]]},
        [
            image("i0"),
            text(0, "a"),
            text(1, "b ", alternative=True),
            text(2, "a.", joined=1),
            text(3, "b .", alternative=True, joined=1),
            image("i1"),
            text(4, "c"),
            image("i2"),
        ],
    ),
    "three edits: the first two may be one": (
        {"image_list": ["i0", "i1", "i2", "i3"], "instruction_list": [["a", "b"], ["c", "d"], ["e"]]},
        [
            image("i0"),
            text(0, "a"),
            text(1, "b", alternative=True),
            text(2, "a. c.", joined=2),
            text(3, "a. d.", alternative=True, joined=2),
            text(4, "b. c.", alternative=True, joined=2),
            text(5, "b. d.", alternative=True, joined=2),
            image("i1"),
            text(6, "c"),
            text(7, "d", alternative=True),
            text(8, "c.", joined=1),
            text(9, "d.", alternative=True, joined=1),
            image("i2"),
            text(10, "e"),
            image("i3"),
        ],
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_of_every_layout(case: str) -> None:
    record, items = ITEMS[case]
    assert declare(record, locate, HERE) == items
    for item in items:
        if isinstance(item, DeclaredText):
            assert isinstance(item.place, Passage)
            assert passage(record, item.place.part) == item.text


def talk(*values: Any, **fields: Any) -> dict[str, Any]:
    """A conversation in which human and gpt take turns."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"conversations": turns, **fields}


FAULTS: dict[str, tuple[Any, str]] = {
    "not an object": (["text"], "invalid record (expected an object, got ['text'])"),
    "unknown layout": (
        {"images": [], "caption": "a"},
        "unknown layout (fields ['caption', 'images']; expected one of items, conversations, image+captions, "
        "image_list+instruction_list, text, messages, ",
    ),
    "text": ({"text": 7}, "invalid record (text: expected a text, got 7)"),
    "half a character": ({"text": "a\ud800"}, r"invalid record (text: expected a text, got 'a\ud800')"),
    "item": ({"items": [{"type": "audio"}]}, "invalid record (items[0]: expected {"),
    "wordings": ({"items": [{"type": "text", "text": []}]}, "items[0].text: expected a list that is not empty, got []"),
    "wording": ({"items": [{"type": "text", "text": ["a", ""]}]}, "items[0].text[1]: expected a text, got ''"),
    "frames": ({"items": [{"type": "video", "frames": "v.mp4"}]}, "items[0].frames: expected a list of frames (video"),
    "no frame": ({"items": [{"type": "video", "frames": []}]}, "items[0].frames: expected a list that is not empty"),
    "frame": ({"items": [{"type": "video", "frames": ["0", 1]}]}, "items[0].frames[1]: expected a path, got 1"),
    "role of a clip": (
        {"items": [{"type": "video", "frames": ["0"], "role": "condition"}]},
        "items[0].role: expected one of target, look, got 'condition'",
    ),
    "conversations": (talk(), "conversations: expected a list that is not empty, got []"),
    "turn": ({"conversations": ["a"]}, "conversations[0]: expected {"),
    "speaker": ({"conversations": [{"from": "system", "value": "a"}]}, "conversations[0]: expected {"),
    "question": (talk(None), "conversations[0]: expected {"),
    "answer": (talk("a", " "), "conversations[1].value: expected a text, got ' '"),
    "nothing said": (talk(" "), "empty record"),
    "images": (talk("a", image={"path": "a"}), "image: expected a path or a list of paths, got {"),
    "image": (talk("<image>", image=[3]), "image[0]: expected a path, got 3"),
    "video": (talk("<video>", video="v.mp4"), "video: expected a list of frames (video files are not decoded"),
    "too few images": (
        talk("<image><image>", image="a"),
        "placeholders do not match (2 x <image> in questions for 1)",
    ),
    "an image that nobody asks for": (talk("a", "b", image="a"), "(0 x <image> in questions for 1)"),
    "a video that is not there": (talk("<video>", "b"), "(1 x <video> in questions for 0)"),
    "captions": ({"image": "i", "captions": "a cat"}, "captions: expected a JSON object of captions, got 'a cat'"),
    "no captions": ({"image": "i", "captions": None}, "captions: expected a JSON object of captions, got None"),
    "caption": ({"image": "i", "captions": '{"a": ["b"]}'}, "captions['a']: expected a text, got ['b']"),
    "captioned image": ({"image": None, "captions": "{}"}, "image: expected a path, got None"),
    "image list": ({"image_list": "ab", "instruction_list": [["a"]]}, "image_list: expected a list that is not empty"),
    "image of a list": (
        {"image_list": ["a", None], "instruction_list": [["a"]]},
        "image_list[1]: expected a path, got None",
    ),
    "steps": (
        {"image_list": ["a", "b", "c"], "instruction_list": [["a"]]},
        "instruction_list: expected 2 steps for 3 images, got [['a']]",
    ),
    "step": (
        {"image_list": ["a", "b"], "instruction_list": ["a"]},
        "instruction_list[0]: expected a list that is not empty, got 'a'",
    ),
    "instruction": (
        {"image_list": ["a", "b"], "instruction_list": [["a", 2]]},
        "instruction_list[0][1]: expected a text, got 2",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_wrong_value_is_named(case: str) -> None:
    record, message = FAULTS[case]
    with pytest.raises(SampleError) as caught:
        declare(record, locate, HERE)
    assert message in str(caught.value)


def test_what_is_no_json() -> None:
    for data in (b"{", b"\xff", b"[" * 100_000, b""):
        with pytest.raises(SampleError, match="broken JSON"):
            parse(data)
