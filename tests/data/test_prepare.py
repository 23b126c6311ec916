import errno
import tarfile
from pathlib import Path

import pytest

from megabagel.data.builders.prepare import prepare
from megabagel.data.index.index import build_index
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from megabagel.errors import UserError
from tests.support.pictures import file_of, noise

PNG, JPEG = file_of(noise(9, 8)), file_of(noise(11, 7), "JPEG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five good images, in two folders, and four that cannot be used."""
    files = {
        "b.png": PNG,
        "b.txt": "ein Bär\n".encode(),
        "a.v2.JPG": JPEG,
        "a.v2.txt": b"version two",
        "deep/er/b.png": PNG,
        "deep/er/b.txt": b"another bear",
        "deep/ü ß.webp": file_of(noise(5, 4), "WEBP"),
        "deep/ü ß.txt": b"umlauts",
        "deep/b.jpeg": JPEG,
        "deep/b.txt": b"a bear",
        "deep/mute.png": PNG,
        "deep/latin.png": PNG,
        "deep/latin.txt": b"caf\xe9",
        "deep/empty.png": b"",
        "deep/empty.txt": b"nothing",
        "deep/half.png": PNG[:60],
        "deep/half.txt": b"half",
        "notes.txt": b"no image",
        "README": b"read me",
    }
    for name, data in files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


def test_images_go_in_unchanged_and_in_order(folder: Path, tmp_path: Path) -> None:
    report = prepare(folder, tmp_path / "out", samples_per_shard=2, name="train")
    assert [path.name for path in report.shards] == [f"train-00000{i}.tar" for i in range(3)]
    assert members(report.shards[0]) == {
        "000000-a_v2.jpg": JPEG,
        "000000-a_v2.txt": b"version two",
        "000001-b.png": PNG,
        "000001-b.txt": "ein Bär".encode(),
    }
    index = build_index(report.shards, ByteTokenizer(), "t2i")
    texts = [index.text(document.texts[0]) for document in index.documents]
    assert texts == ["version two", "ein Bär", "a bear", "another bear", "umlauts"]
    assert not index.skipped


def test_the_report_counts_by_reason(folder: Path, tmp_path: Path) -> None:
    report = prepare(folder, tmp_path / "out", samples_per_shard=1000, name="train")
    assert (report.images, report.samples, len(report.shards)) == (9, 5, 1)
    assert report.skipped == {
        "no caption": ["deep/mute.png"],
        "caption is not UTF-8": ["deep/latin.png"],
        "zero bytes": ["deep/empty.png"],
        "damaged image": ["deep/half.png"],
    }
    assert str(report).splitlines()[0] == "images: 9, samples: 5, skipped: 4, shards: 1"
    assert "  1 x zero bytes, first deep/empty.png" in str(report).splitlines()


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    shards = [prepare(folder, tmp_path / out, samples_per_shard=3, name="a").shards for out in ("x", "y")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


def test_old_shards_are_not_mixed_with_new_ones(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", samples_per_shard=3, name="a")
    prepare(folder, tmp_path / "out", samples_per_shard=3, name="b")
    with pytest.raises(UserError, match=r"a-000000\.tar exists already.*remove the 2 old shards"):
        prepare(folder, tmp_path / "out", samples_per_shard=9, name="a")


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "close", full)
    with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"):
        prepare(folder, tmp_path / "out", samples_per_shard=2, name="a")
    assert not list((tmp_path / "out").iterdir())


def test_users_mistakes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="gone: no such folder"):
        prepare(tmp_path / "gone", tmp_path / "out", samples_per_shard=2, name="a")
    with pytest.raises(UserError, match="none: no image in it"):
        prepare(tmp_path / "none", tmp_path / "out", samples_per_shard=2, name="a")
    with pytest.raises(UserError, match=r"b\.txt: cannot be written"):
        prepare(folder, folder / "b.txt", samples_per_shard=2, name="a")
    (tmp_path / "none" / "mute.png").write_bytes(PNG)
    with pytest.raises(UserError, match=r"(?s)no image can be used.*1 x no caption, first mute\.png"):
        prepare(tmp_path / "none", tmp_path / "out", samples_per_shard=2, name="a")


def test_images_by_content_captions_in_capitals_and_hidden_folders(tmp_path: Path) -> None:
    files = {
        "a.JPG": JPEG,
        "a.TXT": b"in capitals",
        "b.jfif": JPEG,
        "b.txt": b"by content",
        "c.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "c.txt": b"not decoded here",
        "d.psd": b"8BPS\0\1" + bytes(20),
        "e.pdf": b"%PDF-1.4",
        ".thumb/a.png": PNG,
        ".thumb/a.txt": b"hidden",
        ".f.png": PNG,
    }
    for name, data in files.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    report = prepare(tmp_path / "images", tmp_path / "out", samples_per_shard=9, name="a")
    assert (report.images, report.samples) == (4, 2)
    assert report.skipped == {"not an image": ["c.heic"], "no caption": ["d.psd"]}
    assert [document.texts[0].source for document in build_index(report.shards, ByteTokenizer(), "t2i").documents] == [
        "in capitals",
        "by content",
    ]
    assert report.text(every=True).splitlines()[-2:] == ["  no caption: d.psd", "  not an image: c.heic"]
