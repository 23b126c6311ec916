"""JSONL: records by the offset of their line, images from a folder that paths do not leave."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megabagel.data.documents import ImageItem, Loose, Member, Passage, SampleError, TextItem
from megabagel.data.formats import reader
from megabagel.data.index import index as module
from megabagel.data.index.index import Index, build_index
from megabagel.errors import UserError
from tests.data.test_index import BYTES
from tests.support.pictures import file_of, noise


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def items(index: Index) -> list[list[Any]]:
    """Texts as they are read, images as (width, height), in order."""
    return [
        [index.text(item) if isinstance(item, TextItem) else (item.width, item.height) for item in document.items]
        for document in index.documents
    ]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures 0.png ... 4.png and deep/5.jpg, of 10 + n by 20 + 2 n pixels."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n in range(5):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(file_of(noise(10 + n, 20 + 2 * n)))
    (tmp_path / "pictures" / "deep" / "5.jpg").write_bytes(file_of(noise(15, 30), "JPEG"))
    return tmp_path / "pictures"


def test_texts_by_line(tmp_path: Path) -> None:
    """Blank lines, no line end at the end, words beyond ASCII, texts too long for the index."""
    long, last = "ä\n" * module.INLINE_BYTES, "zwölf" * module.INLINE_BYTES
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("one", long, last)]
    lines = [lines[0], "", lines[1], "  ", lines[2]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for _ in range(2):  # the second time from the cache
        index = build_index([tmp_path / "a.jsonl"], BYTES, "text")
        assert [document.key for document in index.documents] == ["line 1", "line 3", "line 5"]
        assert items(index) == [["one"], [long], [last]]
        ids = [3, 3 * module.INLINE_BYTES, 6 * module.INLINE_BYTES]
        assert [document.texts[0].n_ids for document in index.documents] == ids
        start, size, size_of_last = len(lines[0]) + 2, len(lines[2].encode()) + 1, len(lines[4].encode())
        places = [Member(0, start, size), Member(0, start + size + 3, size_of_last)]
        sources = [document.texts[0].source for document in index.documents]
        assert sources == ["one", *(Passage(place, 0) for place in places)]


def test_conversations_with_pictures_and_a_clip(tmp_path: Path, pictures: Path) -> None:
    shard = write(
        tmp_path / "vlm.jsonl",
        {
            "image": ["2.png", "deep/5.jpg"],
            "conversations": [
                {"from": "human", "value": "<image>\nor <image>?"},
                {"from": "gpt", "value": "Both."},
            ],
        },
        {
            "video": ["0.png", "1.png", "3.png"],
            "conversations": [{"from": "human", "value": "What moves?\n<video>"}, {"from": "gpt", "value": "It."}],
        },
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]},
    )
    index = build_index([shard], BYTES, "i2t", images=pictures)
    assert items(index) == [
        [(12, 24), "or", (15, 30), "?", "Both."],
        ["What moves?", (10, 20), (11, 22), (13, 26), "It."],
        ["Hello", "Hello."],
    ]
    assert [[item.role for item in document.items] for document in index.documents] == [
        ["look", "condition", "look", "condition", "target"],
        ["condition", "look", "look", "look", "target"],
        ["condition", "target"],
    ]
    clip = index.documents[1].images
    assert [image.frame for image in clip] == [False, True, True]
    assert clip[2].member == Loose("3.png", (pictures / "3.png").stat().st_size)
    assert index.read(clip[2].member) == (pictures / "3.png").read_bytes()
    assert build_index([shard], BYTES, "interleave", images=pictures).documents[0] == index.documents[0]


def test_an_interleaved_document_with_wordings(tmp_path: Path, pictures: Path) -> None:
    record = {
        "items": [
            {"type": "image", "name": "0.png", "role": "condition"},
            {"type": "text", "text": ["brighter", "lift the shadows"], "role": "condition"},
            {"type": "image", "name": "4.png", "role": "target"},
        ]
    }
    index = build_index([write(tmp_path / "a.jsonl", record)], BYTES, "interleave", images=pictures)
    assert items(index) == [[(10, 20), "brighter", "lift the shadows", (14, 28)]]
    assert [text.alternative for text in index.documents[0].texts] == [False, True]


def test_images_lie_beside_the_file_by_default(pictures: Path) -> None:
    shard = write(pictures / "a.jsonl", {"items": [{"type": "text", "text": "a"}, {"type": "image", "name": "1.png"}]})
    assert items(build_index([shard], BYTES, "t2i")) == [["a", (11, 22)]]


def picture(name: Any) -> dict[str, Any]:
    return {"items": [{"type": "text", "text": "a"}, {"type": "image", "name": name}]}


def test_faults_are_named_by_line_field_and_value(tmp_path: Path, pictures: Path) -> None:
    (pictures / "bad.png").write_bytes((pictures / "0.png").read_bytes()[:99])
    (tmp_path / "secret.png").write_bytes((pictures / "0.png").read_bytes())
    shard = write(
        tmp_path / "a.jsonl",
        picture("0.png"),
        picture("gone.png"),
        picture("../secret.png"),
        picture("deep/../../secret.png"),
        picture(str(tmp_path / "secret.png")),
        picture("nul\0.png"),
        picture(7),
        picture("bad.png"),
        picture("deep"),
        [],
    )
    with shard.open("a") as file:
        file.write('{"text": \n')
    index = build_index([shard], BYTES, "t2i", images=pictures)
    assert [document.key for document in index.documents] == ["line 1"]
    leaves, missing = "path leaves the image folder", "image is missing"
    faults = [(skip.key, skip.reason) for skip in index.skipped]
    assert faults == [
        ("line 2", missing),
        *((f"line {n}", leaves) for n in (3, 4, 5, 6)),
        ("line 7", "invalid record"),
        ("line 8", "damaged image"),
        ("line 9", missing),
        ("line 10", "invalid record"),
        ("line 11", "broken JSON"),
    ]
    told = [str(skip) for skip in index.skipped]
    assert told[0] == f"a.jsonl: line 2: image is missing (items[1].name: 'gone.png' in {pictures})"
    assert told[1] == f"a.jsonl: line 3: path leaves the image folder (items[1].name: '../secret.png' in {pictures})"
    assert told[5] == "a.jsonl: line 7: invalid record (items[1].name: expected the path of an image, got 7)"
    assert told[6].startswith("a.jsonl: line 8: damaged image (bad.png: ")


def test_an_image_that_is_lost_later_is_a_fault_of_its_sample(tmp_path: Path, pictures: Path) -> None:
    index = build_index([write(tmp_path / "a.jsonl", picture("0.png"))], BYTES, "t2i", images=pictures)
    place = index.documents[0].images[0].member
    with (pictures / "0.png").open("ab") as file:
        file.write(b"more")
    with pytest.raises(SampleError, match=r"image changed .*0\.png: \d+ bytes, not \d+"):
        index.read(place)
    (pictures / "0.png").unlink()
    with pytest.raises(SampleError, match=r"image is missing .*0\.png"):
        index.read(place)


@pytest.mark.parametrize("method", [(Path, "stat"), (reader, "read_file")])
@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_a_file_that_cannot_be_read_is_not_missing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, fault: int, method: tuple[Any, str]
) -> None:
    """The index ends with a message and keeps nothing; once the disk is back, the image is found."""
    shard, real = write(tmp_path / "a.jsonl", picture("0.png"), picture("1.png")), getattr(*method)

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "1.png":
            raise OSError(fault, os.strerror(fault))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*method, failing)
        with pytest.raises(UserError, match=rf"1\.png: cannot be read \({os.strerror(fault)}\)\. Mend"):
            build_index([shard], BYTES, "t2i", images=pictures)
    assert len(build_index([shard], BYTES, "t2i", images=pictures).documents) == 2


def test_names_that_no_file_can_have_are_faults_of_their_samples(tmp_path: Path, pictures: Path) -> None:
    names = ["x" * 300, "0.png/x", "round", "\ud800"]
    (pictures / "round").symlink_to("round")
    index = build_index([write(tmp_path / "a.jsonl", *map(picture, [*names, "0.png"]))], BYTES, "t2i", images=pictures)
    assert [skip.reason for skip in index.skipped] == ["image is missing"] * 4 and len(index.documents) == 1


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"a\.jsonl: no sample is usable .*samples: 0, skipped: 0, shards: 1"):
        build_index([tmp_path / "a.jsonl"], BYTES, "text")


def test_items_are_images_or_texts(tmp_path: Path, pictures: Path) -> None:
    """Many documents of one file keep their own places."""
    shard = write(tmp_path / "a.jsonl", *(picture(f"{n % 5}.png") for n in range(50)))
    index = build_index([shard], BYTES, "i2t", images=pictures)
    for n, document in enumerate(index.documents):
        image, text = document.items
        assert isinstance(image, ImageItem) and isinstance(text, TextItem)
        assert index.read(image.member) == (pictures / f"{n % 5}.png").read_bytes()
