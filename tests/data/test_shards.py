import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest

from megabagel.data.documents import Member
from megabagel.data.formats import shards
from megabagel.data.formats.shards import ShardReader, TarFile, list_files, split_name, write_shards
from megabagel.errors import UserError

SAMPLES = [(f"s{i}", {"jpg": bytes([i]) * (300 + 400 * i), "txt": f"caption {i}".encode()}) for i in range(5)]


def contents(shard: Path, files: list[TarFile]) -> dict[str, bytes]:
    data = shard.read_bytes()
    return {file.name: data[file.offset : file.offset + file.size] for file in files}


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("000.jpg", "000", "jpg"),
        ("000.0.PNG", "000", "0.png"),
        ("a.b/c.d/000.1.png", "a.b/c.d/000", "1.png"),
        ("readme", "readme", ""),
        ("a/.hidden.png", "a/", "hidden.png"),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_base_name(name: str, key: str, extension: str) -> None:
    assert split_name(name) == (key, extension)


def test_shards_hold_what_was_written_and_nothing_of_the_day(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, "a", SAMPLES, 2)
    assert [path.name for path in paths] == ["a-000000.tar", "a-000001.tar", "a-000002.tar"]
    found = {}
    for path in paths:
        files, damage = list_files(path)
        assert damage is None
        found |= contents(path, files)
    assert found == {f"{key}.{extension}": data for key, files in SAMPLES for extension, data in files.items()}
    again = write_shards(tmp_path, "b", SAMPLES, 2)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_links_of_any_tar(tmp_path: Path, format: int) -> None:
    name = "folder/" * 12 + "x" * 90 + ".0.png"  # 174 characters: beyond the plain field of 100
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("folder/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(link)
        info = tarfile.TarInfo(name)
        info.size = 700
        tar.addfile(info, io.BytesIO(b"ab" * 350))
    files, damage = list_files(tmp_path / "a.tar")
    assert damage is None
    assert [(file.name, file.fault) for file in files] == [("folder/link.png", "a symbolic link"), (name, "")]
    assert contents(tmp_path / "a.tar", files[1:]) == {name: b"ab" * 350}


def test_a_shard_cut_anywhere_lists_a_prefix_and_says_so(tmp_path: Path) -> None:
    (whole,) = write_shards(tmp_path, "a", SAMPLES, 9)
    data, (files, _) = whole.read_bytes(), list_files(whole)
    cut = tmp_path / "cut.tar"
    for length in [*range(512, len(data), 331), *range(512, len(data), 512)]:
        cut.write_bytes(data[:length])
        found, damage = list_files(cut)
        assert found == files[: len(found)]
        assert all(file.offset + file.size <= length for file in found[:-1])
        end = files[-1].offset + -(-files[-1].size // 512) * 512
        assert (damage is None) == (length >= end + 512), length


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, "a", SAMPLES, 9)
    files, _ = list_files(shard)
    data = bytearray(shard.read_bytes())
    data[files[4].offset - 512] ^= 0xFF
    shard.write_bytes(data)
    found, damage = list_files(shard)
    assert found == files[:4]
    assert damage == f"no end mark at byte {files[4].offset - 512}"


@pytest.mark.parametrize("data", [None, b"", b"not a tar at all" * 100])
def test_what_is_no_tar_is_the_users_mistake(tmp_path: Path, data: bytes | None) -> None:
    shard = tmp_path / "a.tar"
    if data is not None:
        shard.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar: cannot be read as a shard .*megabagel data prepare"):
        list_files(shard)


def test_a_reader_serves_threads_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_open", lru_cache(maxsize=2)(shards._open.__wrapped__))
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(bytes([number]) * 1200)
    readers = [ShardReader(paths), ShardReader(paths[::-1])]  # as those of two sources
    wanted = [Member(number % 6, number, number + 1) for number in range(600)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda member: [reader.read(member) for reader in readers], wanted))
    assert found == [[bytes([m.shard]) * m.size, bytes([5 - m.shard]) * m.size] for m in wanted]
    held = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    assert sum(path in paths for path in held) == 2


def test_a_new_reader_does_not_read_a_file_that_was_replaced(tmp_path: Path) -> None:
    for data in (b"1234", b"5678"):
        (tmp_path / "new").write_bytes(data)
        (tmp_path / "new").rename(tmp_path / "a.tar")
        assert ShardReader([tmp_path / "a.tar"]).read(Member(0, 1, 2)) == data[1:3]


def test_a_shard_that_changes_under_the_run_is_the_users_mistake(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"12345678")
    reader = ShardReader([shard])
    assert reader.read(Member(0, 2, 3)) == b"345"
    with pytest.raises(UserError, match="2 of 5 bytes at offset 6"):
        reader.read(Member(0, 6, 5))
    with pytest.raises(UserError, match=r"gone\.tar: cannot be read"):
        ShardReader([tmp_path / "gone.tar"]).read(Member(0, 0, 1))
