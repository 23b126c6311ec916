"""Hostile and odd tars: each ends in the sound samples and a named skip, or in one message."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megabagel.data import tar
from megabagel.data.formats import records
from megabagel.data.formats.jsonl import lines
from megabagel.data.formats.shards import list_files
from megabagel.data.index.index import Index, build_index
from megabagel.data.tar import TarFile
from megabagel.errors import UserError
from tests.data.test_index import BYTES
from tests.support.pictures import file_of, noise

PNG = file_of(noise(8, 9))
END = bytes(1024)


def block(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A header with a right checksum, whatever its fields say."""
    plain = bytearray(512)
    plain[0 : len(name)], plain[124 : 124 + len(size)], plain[156:157] = name, size, kind
    plain[157 : 157 + len(link)], plain[257:265], plain[148:156] = link, b"ustar\x0000", b" " * 8
    plain[148:156] = b"%06o\0 " % sum(plain)
    return bytes(plain)


def member(name: bytes, data: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    return block(name, b"%011o\0" % len(data), kind, link) + data + bytes(-len(data) % 512)


def base256(size: int) -> bytes:
    return (b"\x80" + size.to_bytes(11, "big")) if size >= 0 else size.to_bytes(12, "big", signed=True)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    data = b""
    for key, value in records:
        body = b" " + key + b"=" + value + b"\n"
        length = next(n for n in range(len(body), len(body) + 30) if n == len(body) + len(str(n)))
        data += str(length).encode() + body
    return member(b"PaxHeader/x", data, kind)


GOOD = member(b"g1.png", PNG) + member(b"g1.txt", b"a red box")
H = member(b"h.png", PNG)


def index_of(folder: Path, data: bytes, task: str = "t2i") -> Index:
    (folder / "a.tar").write_bytes(data)
    return build_index([folder / "a.tar"], BYTES, task)  # type: ignore[arg-type]


def outcome(index: Index) -> tuple[list[str], list[tuple[str, str]]]:
    return [document.key for document in index.documents], [(skip.key, skip.reason) for skip in index.skipped]


BROKEN = {
    "8 EiB": GOOD + block(b"h.png", base256(2**63 - 1)),
    "2**87": GOOD + block(b"h.png", base256(2**87)),
    "negative size": GOOD + block(b"h.png", base256(-512)) + H,
    "octal with a sign": GOOD + block(b"h.png", b"-0000001000\0") + H,
    "size of a PAX header": GOOD + pax((b"size", b"9" * 29)) + H,
    "negative size of a PAX header": GOOD + pax((b"size", b"-512")) + H,
    "PAX header of 8 EiB": GOOD + block(b"PaxHeader/x", base256(2**63), b"x") + H,
    "PAX header of negative size": GOOD + block(b"PaxHeader/x", base256(-512), b"x") + H,
    "long name of 8 GiB": GOOD + block(b"././@LongLink", base256(2**33), b"L") + H,
    "long name of negative size": GOOD + block(b"././@LongLink", base256(-512), b"L") + H,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_header_that_leads_nowhere_ends_the_shard_by_name(tmp_path: Path, case: str) -> None:
    keys, skipped = outcome(
        index_of(tmp_path, GOOD + member(b"k.png", PNG) + member(b"k.txt", b"k") + BROKEN[case][len(GOOD) :] + END)
    )
    assert keys[0] == "g1" and skipped[0][1] == "damaged shard" and skipped[0][0] in ("h", "k")
    with pytest.raises(UserError, match="no sample is usable"):
        index_of(tmp_path, BROKEN[case][len(GOOD) :] + END)


SPARSE = {
    "PAX 0.1": pax((b"GNU.sparse.map", b"0,10,x,5"), (b"GNU.sparse.size", b"100")) + H,
    "PAX 0.0": pax((b"GNU.sparse.size", b"x"), (b"GNU.sparse.offset", b"0")) + H,
    "PAX 1.0": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"x"), (b"GNU.sparse.name", b"h.png"))
    + member(b"./GNUSparseFile.1/x", PNG),
    "GNU": member(b"h.png", PNG, b"S"),
    "hard link to nothing": member(b"h.png", b"", b"1", b"gone.png"),
    "symbolic link": member(b"h.png", b"", b"2", b"g1.png"),
    "FIFO": member(b"h.png", b"", b"6"),
    "device": member(b"h.png", b"", b"3"),
    "unknown type": member(b"h.png", PNG, b"Q"),
    "malformed PAX header": member(b"PaxHeader/x", b"99 path=a\n", b"x") + H,
    "long header": member(b"PaxHeader/x", bytes(2000), b"x") + H,
}


@pytest.mark.parametrize("case", SPARSE)
def test_a_member_without_readable_bytes_loses_its_sample_alone(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a caption beside it, the sample would else pass for a text."""
    monkeypatch.setattr(tar, "MAX_EXTENSION", 1000)
    data = SPARSE[case] + member(b"h.txt", b"a caption") + GOOD + END
    for task in ("t2i", "text") if case != "FIFO" else ("t2i",):
        data = data.replace(GOOD, GOOD + member(b"z.txt", b"z")) if task == "text" else data
        keys, skipped = outcome(index_of(tmp_path, data, task))
        assert "h" not in keys and ("h", "no regular file") in skipped


def test_a_hard_link_is_the_file_that_it_links_to(tmp_path: Path) -> None:
    twin = member(b"b.png", b"", b"1", b"g1.png") + member(b"b.txt", b"another")
    index = index_of(tmp_path, GOOD + twin + END)
    assert outcome(index) == (["g1", "b"], [])
    assert [index.read(document.images[0].member) for document in index.documents] == [PNG, PNG]


def test_appended_tars_are_read_and_other_data_behind_the_end_named(tmp_path: Path) -> None:
    second = member(b"k.png", PNG) + member(b"k.txt", b"k")
    assert outcome(index_of(tmp_path, GOOD + bytes(10240) + second + END)) == (["g1", "k"], [])
    assert outcome(index_of(tmp_path, GOOD + END + b"leftover" * 100)) == (["g1"], [("", "damaged shard")])
    assert (
        index_of(tmp_path, GOOD + END + b"x").skipped[0].detail == f"data after the end mark at byte {len(GOOD) + 1024}"
    )


def test_global_headers_are_many_and_name_nothing_else(tmp_path: Path) -> None:
    data = pax((b"comment", b"x"), kind=b"g") * 3000 + GOOD + END
    assert outcome(index_of(tmp_path, data)) == (["g1"], [])


def test_names_that_are_no_utf8_stay_apart_and_can_be_shown(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form, encoding="latin-1") as file:
            for stem in ("caf\xe9", "caf\xe8", "plain\x1b[31m"):
                for extension, data in (("png", PNG), ("txt", stem.encode())):
                    info = tarfile.TarInfo(f"{stem}.{extension}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
        for _ in range(2):  # the second time from the cache
            index = build_index([tmp_path / "a.tar"], BYTES, "t2i")
            assert len(index.documents) == 3 and not index.skipped
    bad = GOOD + member(b"caf\xe9\x1b.png", b"no image") + member(b"caf\xe9\x1b.txt", b"a") + END
    (skip,) = index_of(tmp_path, bad).skipped
    assert str(skip).startswith(r"a.tar: caf\xe9\x1b: not an image")


def test_no_file_of_a_sample_is_read_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabagel.data.formats.samples.MAX_TEXT_BYTES", 100)
    monkeypatch.setattr("megabagel.data.formats.samples.MAX_RECORD_BYTES", 100)
    monkeypatch.setattr("megabagel.data.formats.reader.MAX_IMAGE_BYTES", 2**20)
    extra = [
        member(b"t.txt", bytes(101)),
        member(b"j.json", bytes(101)),
        member(b"p.png", bytes(2**20 + 1)) + member(b"p.txt", b"p"),
    ]
    _, skipped = outcome(index_of(tmp_path, GOOD + b"".join(extra) + END))
    assert skipped == [("t", "text too long"), ("j", "text too long"), ("p", "image file too large")]


def test_a_line_without_an_end_is_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabagel.data.formats.jsonl.MAX_RECORD_BYTES", 1000)
    short = json.dumps({"text": "short"}).encode()
    (tmp_path / "a.jsonl").write_bytes(short + b"\n" + b"x" * 5000 + b"\n" + short + b"\n" + b'{"text": "' + b"y" * 991)
    index = build_index([tmp_path / "a.jsonl"], BYTES, "text")
    assert outcome(index) == (["line 1", "line 3"], [("line 2", "record too long"), ("line 4", "record too long")])
    assert [index.text(document.texts[0]) for document in index.documents] == ["short", "short"]


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_an_image_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "good.png").write_bytes(PNG)
    name = tmp_path / "odd.png"
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(name),
        "device": lambda: name.symlink_to("/dev/zero"),
        "socket": lambda: os.mknod(name, 0o140600),
    }
    make[kind]()
    rows = [{"image": "odd.png", "text": "a"}, {"image": "good.png", "text": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert outcome(build_index([tmp_path / "a.jsonl"], BYTES, "t2i")) == (
        ["line 2"],
        [("line 1", "image is no regular file")],
    )


def test_wordings_that_multiply_are_refused(tmp_path: Path) -> None:
    step = ["a"] * 100
    record = {"image_list": ["i"] * 4, "instruction_list": [step] * 3}
    place = records.Member(0, 0, 0)
    with pytest.raises(records.SampleError, match="too many wordings"):
        records.declare(record, lambda *_: place, place)
    with pytest.raises(records.SampleError, match="too many items"):
        records.declare({"items": [{"type": "text", "text": ["a"] * 20000}]}, lambda *_: place, place)


def test_old_headers_are_understood(tmp_path: Path) -> None:
    """Signed checksums, V7 without magic, long names, GNU's magic with other things in the prefix."""
    name = b"\xc3\xa9" * 2 + b"x" * 92 + b".txt"
    old = bytearray(member(name, b"text", b"\0"))
    old[257:265] = bytes(8)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in old[:512])
    gnu = bytearray(member(b"b.txt", b"more"))
    gnu[257:265], gnu[345:356], gnu[148:156] = b"ustar  \0", b"12345670123", b" " * 8
    gnu[148:156] = b"%06o\0 " % sum(gnu[:512])
    (tmp_path / "a.tar").write_bytes(bytes(old) + bytes(gnu) + END)
    files, damage = list_files(tmp_path / "a.tar")
    assert damage is None
    assert files == [TarFile("é" * 2 + "x" * 92 + ".txt", 512, 4), TarFile("b.txt", 1536, 4)]


def test_fields_without_a_use_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 7}\n')
    unused: Counter[str] = Counter()
    for _, declare in lines(tmp_path / "a.jsonl", 0, tmp_path, unused):
        declare()
    assert unused == {"id": 1}
