"""WARC files: the same documents as from a folder, every record accounted for, damage that costs one record."""

import gzip
import zlib
from pathlib import Path

import pytest

from megabagel.curation.draft import Draft
from megabagel.curation.read import warc
from megabagel.curation.read.reader import Seen, reader_of
from megabagel.curation.read.warc import records, response
from megabagel.curation.read.web import decoded
from tests.support.curation_pages import SITE, record, warc_of


def read(folder: Path) -> tuple[list[Draft], Seen]:
    reader, seen = reader_of("web"), Seen()
    drafts = [
        draft
        for partition in reader.find([folder], **reader.options)
        for draft in reader.read(partition, seen, **reader.options)
    ]
    return drafts, seen


@pytest.mark.parametrize("zipped", [True, False])
def test_a_crawl_gives_the_documents_of_the_folder(pages: Path, tmp_path: Path, zipped: bool) -> None:
    (tmp_path / ("crawl.warc.gz" if zipped else "crawl.warc")).write_bytes(warc_of(pages, zipped))
    crawled, seen = read(tmp_path)
    plain, _ = read(pages)
    contents = [[(getattr(item, "text", ""), getattr(item, "data", b"")) for item in draft.items] for draft in crawled]
    expected = [[(getattr(item, "text", ""), getattr(item, "data", b"")) for item in draft.items] for draft in plain]
    assert contents == expected and len(contents) == 12
    assert [draft.source for draft in crawled] == [SITE + draft.source for draft in plain]
    pictures = len(list(pages.rglob("*.png")))
    assert seen.records == {
        "warcinfo": 1, "request": 12 + pictures, "response: image/png": pictures, "response: text/html": 12,
    }  # fmt: skip


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    def answer(status: str, headers: str, body: bytes = b"") -> bytes:
        return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body

    html = "Content-Type: text/html"
    page, chunked = b"<p>text</p>", f"{html}\r\nTransfer-Encoding: chunked"
    url = {"WARC-Target-URI": "<http://a.example/x>"}
    found = [
        record("warcinfo", {}, b""),
        record("response", url, answer("200 OK", html, page)),
        record("response", url, answer("404 Not Found", html, page)),
        record("response", url, answer("200 OK", html)),
        record("response", url, answer("200 OK", f"{html}\r\nContent-Encoding: br", page)),
        record("response", url, answer("200 OK", f"{html}\r\nContent-Encoding: gzip", gzip.compress(page))),
        record("response", url, answer("200 OK", f"{html}\r\nContent-Encoding: deflate", zlib.compress(page))),
        record("response", url, answer("200 OK", f"{html}\r\nContent-Encoding: gzip", b"\x1f\x8b no")),
        record("response", url, answer("200 OK", chunked, b"b\r\n" + page + b"\r\n0\r\n\r\n")),
        record("response", {"WARC-Target-URI": "dns:a.example"}, b"a.example. 1"),
        record("revisit", url, b""),
        record("resource", {**url, "Content-Type": "text/html"}, page),
        b"WARC/1.0\r\nWARC-Type: response\r\n\r\n\r\n",
    ]  # fmt: skip
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, found)))
    drafts, seen = read(tmp_path)
    assert sum(seen.records.values()) == len(found)
    assert seen.records == {
        "warcinfo": 1, "response: text/html": 4, "response: status 404": 1, "response: empty": 1,
        "response: content encoding br": 1, "response: damaged content encoding": 1, "response: not of HTTP": 1,
        "revisit": 1, "resource: text/html": 1, "response: no Content-Length": 1,
    }  # fmt: skip
    assert [draft.text for draft in drafts] == ["text"] * 5


def test_damage_costs_its_record_alone(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [
        gzip.compress(record("resource", {"WARC-Target-URI": f"http://a/{n}"}, bytes([n]) * 400)) for n in range(6)
    ]
    broken = bytearray(members[2])
    broken[20:30] = b"\xff" * 10
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join([*members[:2], broken, *members[3:5], members[5][:-20]]))
    found = list(records(path))
    assert [x.url[-1:] or x.fault for x in found] == ["0", "1", "damaged gzip member", "3", "4", "cut off"]
    assert next(x.content[:1] for x in records(path, found[3].offset)) == b"\x03"  # read again by its offset

    monkeypatch.setattr(warc, "MOST_BYTES", 1000)
    large = record("resource", {"WARC-Target-URI": "http://a/l"}, b"x" * 2000)
    path.write_bytes(members[0] + gzip.compress(large) + members[1])
    assert [x.url[-1:] or x.fault for x in records(path)] == ["0", "record too large", "1"]
    plain = tmp_path / "b.warc"
    small = [record("resource", {"WARC-Target-URI": f"http://a/{n}"}, b"y") for n in range(2)]
    plain.write_bytes(small[0] + b"rubbish\r\n" + large + small[1] + small[0][:-8])
    assert [(x.url[-1:], x.fault) for x in records(plain)] == [
        ("0", ""), ("l", "record too large"), ("1", ""), ("0", "cut off"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "declared", "text"),
    [
        ("<p>ä</p>".encode(), "", "<p>ä</p>"),
        ("<p>ä</p>".encode("latin-1"), "", "<p>ä</p>"),
        ("<p>ж</p>".encode("cp1251"), "windows-1251", "<p>ж</p>"),
        ('<meta charset="koi8-r"><p>ж</p>'.encode("koi8-r"), "", '<meta charset="koi8-r"><p>ж</p>'),
        ("<p>ä</p>".encode("utf-16"), "", "<p>ä</p>"),
        ("<p>ä</p>".encode(), "no-such-charset", "<p>ä</p>"),
        ("<p>ä</p>".encode(), "hex", "<p>ä</p>"),
        (b"\xef\xbb\xbf<p>x</p>", "latin-1", "<p>x</p>"),
    ],
)
def test_encodings(data: bytes, declared: str, text: str) -> None:
    assert decoded(data, declared) == text


def test_a_response_without_sense() -> None:
    assert response(b"").status == 0 and response(b"HTTP/1.1 abc\r\n\r\n").status == 0
