"""Edits, questions and clips from plain files: what becomes of them in the index, and what is left out by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megabagel.data.builders.prepare import Report, prepare
from megabagel.data.documents import ImageItem, Task
from megabagel.data.index.index import build_index
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from megabagel.errors import UserError
from tests.support.pictures import file_of, noise


def picture(height: int) -> bytes:
    """A PNG that its height tells from others."""
    return file_of(noise(8, height))


def made(root: Path, files: dict[str, Any], kind: str) -> Report:
    """Write files and prepare them."""
    for name, data in files.items():
        path = root / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else dump(data))
    return prepare(root / "in", root / "out", samples_per_shard=9, name="a", kind=kind)


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def items(report: Report, task: Task) -> list[list[tuple[str | int, str | None]]]:
    """(text, or height of the image; role) of every item of every document."""
    index = build_index(report.shards, ByteTokenizer(), task)
    assert not index.skipped and not index.unused
    return [
        [(item.height if isinstance(item, ImageItem) else index.text(item), item.role) for item in document.items]
        for document in index.documents
    ]


def test_edits(tmp_path: Path) -> None:
    files = {
        "b/pair.input.png": picture(9),
        "b/pair.output.PNG": picture(10),
        "b/pair.txt": "make it\nblue\n",
        "chain.10.png": picture(13),
        "chain.2.png": picture(12),
        "chain.1.png": picture(11),
        "chain.txt": "first\n\n second \n",
        "few.0.png": picture(9),
        "few.txt": "one",
        "lines.0.png": picture(9),
        "lines.1.png": picture(9),
        "lines.2.png": picture(9),
        "lines.txt": "one line",
        "odd.a.png": picture(9),
        "odd.b.png": picture(9),
        "odd.txt": "x",
        "mute.0.png": picture(9),
        "mute.1.png": picture(9),
        "bad.0.png": picture(9),
        "bad.1.png": picture(9)[:50],
        "bad.txt": "x",
    }
    report = made(tmp_path, files, "edits")
    pair, chain = items(report, "edit")
    assert pair == [(9, "condition"), ("make it\nblue", "condition"), (10, "target")]
    # The first step, the joined instruction of a start with both steps (as released: the first alone, with its full
    # stop, as two steps would end at the last image), the second step.
    texts = ["first", "first.", "second"]
    assert chain == [
        (11, "condition"),
        *((text, "condition") for text in texts[:2]),
        (12, "target"),
        (texts[2], "condition"),
        (13, "target"),
    ]
    assert report.skipped == {
        "fewer than two images": ["few"],
        "not a line per step": ["lines"],
        "images with unknown names": ["odd"],
        "no instruction": ["mute"],
        "damaged image": ["bad"],
    }
    assert str(report).startswith("edits: 7, samples: 2, skipped: 5, shards: 1\n")


def test_questions_beside_their_images(tmp_path: Path) -> None:
    files = {
        "a.png": picture(9),
        "a.json": [{"question": "What is <image>it?", "answer": "A. "}, {"question": " And?", "answer": "B."}],
        "b.jpg": picture(10),
        "b.json": {"question": "One?", "answer": "C."},
        "mute.png": picture(9),
        "none.png": picture(9),
        "none.json": [],
        "half.png": picture(9),
        "half.json": {"question": "No answer?"},
        "broken.png": picture(9),
        "broken.json": "{",
    }
    report = made(tmp_path, files, "questions")
    assert items(report, "i2t") == [
        [(9, "look"), ("What is it?", "condition"), ("A.", "target"), ("And?", "condition"), ("B.", "target")],
        [(10, "look"), ("One?", "condition"), ("C.", "target")],
    ]
    assert report.skipped == {
        "no questions": ["mute.png", "none.png"],
        "no question and answer": ["half.png"],
        "broken JSON": ["broken.png"],
    }


def row(image: Any, question: str = "What?", answer: str = "A.") -> dict[str, Any]:
    return {"image": image, "question": question, "answer": answer}


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.json"])
def test_questions_in_one_table(tmp_path: Path, name: str) -> None:
    rows = [row("deep/a.png"), row("gone.png"), row("deep/a.png", "And?", "B."), row("../secret.png"), row("/etc/x")]
    table = rows if name.endswith("json") else b"\n".join(map(dump, rows)) + b"\n\n"
    (tmp_path / "secret.png").write_bytes(picture(9))
    report = made(tmp_path, {"deep/a.png": picture(9), "unasked.png": picture(10), name: table}, "questions")
    assert items(report, "i2t") == [
        [(9, "look"), ("What?", "condition"), ("A.", "target"), ("And?", "condition"), ("B.", "target")]
    ]
    assert report.skipped == {
        "image is missing": ["gone.png"],
        "path leaves the image folder": ["../secret.png", "/etc/x"],
    }


@pytest.mark.parametrize(
    "table, message",
    [
        ("{", "questions.json: broken JSON"),
        ({"a": 1}, "questions.json: expected a list"),
        ([3], 'questions.json: expected {"image": path'),
        ([{"question": "a"}], 'questions.json: expected {"image": path'),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, table: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        made(tmp_path, {"a.png": picture(9), "questions.json": table}, "questions")
    assert message in str(caught.value)


def test_clips(tmp_path: Path) -> None:
    files = {
        "a/f10.png": picture(11),
        "a/f9.png": picture(10),
        "a/f1.png": picture(9),
        "a.txt": "it grows",
        "deep/b/0.png": picture(12),
        "deep/b/1.png": picture(13),
        "deep/b/caption.txt": "it stays",
        "one/0.png": picture(9),
        "one.txt": "a single frame",
        "two/0.png": picture(9),
        "two/1.png": picture(9),
        "two/a.txt": "x",
        "two/b.txt": "y",
        "mute/0.png": picture(9),
        "mute/1.png": picture(9),
    }
    report = made(tmp_path, files, "clips")
    assert items(report, "video") == [
        [("it grows", "condition"), (9, "target"), (10, "target"), (11, "target")],
        [("it stays", "condition"), (12, "target"), (13, "target")],
    ]
    assert report.skipped == {
        "no caption": ["mute"],
        "fewer than two frames": ["one"],
        "several captions": ["two"],
    }
    assert str(report).startswith("clips: 5, samples: 2, skipped: 3, shards: 1\n")


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "in" / "a" / "pipe")
    os.mkfifo(tmp_path / "in" / "a" / "pipe.png")
    with pytest.raises(UserError, match=r"no image can be used\. Expected each with a folder of frames"):
        made(tmp_path, {"a.txt": "x"}, "clips")
