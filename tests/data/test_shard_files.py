"""Which files are shards, what format they have, and a folder that mixes formats."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megabagel.data.formats.shards import write_shards
from megabagel.data.index.index import build_index
from megabagel.data.index.shard_files import find_shards, format_of
from megabagel.errors import UserError
from tests.data.test_index import BYTES, captioned, shard
from tests.support.pictures import file_of, noise


def test_globs_may_be_deep_or_absolute(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    shards = [*shard(tmp_path / "a", captioned(1)), *shard(tmp_path / "a" / "b", captioned(1))]
    assert find_shards(tmp_path, "**/a-*.tar") == sorted(shards)
    assert find_shards(Path("elsewhere"), f"{tmp_path}/a/*.tar") == shards[:1]


def test_a_folder_stands_for_its_shards(tmp_path: Path) -> None:
    for name in ("c.tar", "a.parquet", "b.jsonl", ".hidden.tar", "x.txt", "y.png", "deep/d.tar"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    expected = [tmp_path / "data" / name for name in ("a.parquet", "b.jsonl", "c.tar")]
    assert find_shards(tmp_path, "data") == find_shards(tmp_path / "data", ".") == expected
    assert find_shards(Path("elsewhere"), str(tmp_path / "data")) == expected
    assert find_shards(tmp_path, "data/*.t*") == [tmp_path / "data" / "c.tar", tmp_path / "data" / "x.txt"]


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"path 'x-\*\.tar' with data\.root = .*no file matches.*which exists"):
        find_shards(tmp_path, "x-*.tar")
    with pytest.raises(UserError, match="does not exist"):
        find_shards(tmp_path / "nowhere", "*.tar")
    for pattern in ("", "a**b/*.tar", "/", "."):
        with pytest.raises(UserError, match="Expected WebDataset tars, parquet or JSONL files"):
            find_shards(tmp_path, pattern)


CONTENTS = {
    "parquet": b"PAR1\x15\x04",
    "jsonl": b'\n {"text": "a"}\n',
    "jsonl with a byte order mark": b'\xef\xbb\xbf{"text": "a"}\n',
    "tar": b"0000.png\0\0\0\0",
}


@pytest.mark.parametrize("case", CONTENTS)
def test_formats_are_told_by_contents_and_agree_with_names(tmp_path: Path, case: str) -> None:
    true = case.split()[0]
    for name in ("shard", "shard.data", f"shard.{true}"):
        (tmp_path / name).write_bytes(CONTENTS[case])
        assert format_of(tmp_path / name) == true
    for wrong in {"parquet", "jsonl", "tar"} - {true}:
        (tmp_path / f"x.{wrong}").write_bytes(CONTENTS[case])
        with pytest.raises(
            UserError, match=rf"x\.{wrong}: cannot be read as a shard \(named \.{wrong}, but it begins with"
        ):
            format_of(tmp_path / f"x.{wrong}")


@pytest.mark.parametrize("name", ["[cover] 1.png", "{0}.png", " {.png", "PAR1.png"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_one_whatever_its_first_file_is_called(tmp_path: Path, name: str, format: int) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert format_of(tmp_path / "a.tar") == "tar"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{"x" * 247}ustar  and more"}}')
    assert (tmp_path / "a.jsonl").read_bytes()[257:262] == b"ustar" and format_of(tmp_path / "a.jsonl") == "jsonl"


def test_a_folder_that_mixes_formats(tmp_path: Path) -> None:
    """One image under three roofs: order is by file name, every byte and text is found."""
    pictures = [file_of(noise(20 + n, 30 + 2 * n)) for n in range(4)]
    write_shards(tmp_path, "c", [("t", {"png": pictures[0], "txt": b"in a tar"})], 9)
    table = {"image": pictures[1:3], "captions": ['{"a": "in a row"}', '{"a": "next", "b": "row"}']}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(pictures[3])
    record = {"items": [{"type": "image", "name": "one.png"}, {"type": "text", "text": "in a line"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(record) + "\n")
    for _ in range(2):  # the second time from the cache
        index = build_index(find_shards(tmp_path, "."), BYTES, "t2i", images=tmp_path / "pictures")
        keys = ["group 0 row 0", "group 0 row 1", "line 1", "t"]
        assert [document.key for document in index.documents] == keys
        found = [[index.text(text) for text in document.texts] for document in index.documents]
        assert found == [["in a row"], ["next", "row"], ["in a line"], ["in a tar"]]
        shown = [(image.width, image.height) for document in index.documents for image in document.images]
        assert shown == [(21, 32), (22, 34), (23, 36), (20, 30)]
        read = [index.read(image.member) for document in index.documents for image in document.images]
        assert read == [*pictures[1:3], pictures[3], pictures[0]]
