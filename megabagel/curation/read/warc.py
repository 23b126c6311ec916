"""Records of WARC files (ISO 28500), plain or gzipped by record, in bounded memory.

Own code rather than warcio: every record has to be accounted for, broken ones included, records have to be read again
by their offset, and one page of code does it. A damaged record costs itself alone: reading goes on at the next gzip
member or the next `WARC/1` line.
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 2**26
"""Largest record that is read, uncompressed."""
PIECE = 2**16
_MEMBER = b"\x1f\x8b\x08"
_BEGIN = re.compile(rb"WARC/\d\.\d\r?\n")


@dataclass(frozen=True)
class Record:
    """A record; `fault` is set instead of content where it cannot be used."""

    offset: int
    """Where its gzip member, or itself, begins in the file."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """By name in lower case."""
    content: bytes = b""
    fault: str = ""

    @property
    def type(self) -> str:
        """WARC-Type."""
        return self.headers.get("warc-type", "")

    @property
    def url(self) -> str:
        """WARC-Target-URI, without the <> that wget writes around it."""
        return self.headers.get("warc-target-uri", "").strip("<>")


def records(path: Path, offset: int = 0) -> Iterator[Record]:
    """The records of a file in order, from a member or record that begins at `offset`.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(offset)
        zipped = file.read(2) == _MEMBER[:2]
        file.seek(offset)
        yield from _zipped(file) if zipped else _plain(file)


def _zipped(file: BinaryIO) -> Iterator[Record]:
    place = file.tell()
    while True:
        file.seek(place)
        data, after, fault = _member(file)
        if not data and not fault and after == place:
            return
        if fault:
            yield Record(place, fault=fault)
        else:
            yield from _parsed(data, place)
        place = after if not fault or fault == "record too large" else _next_member(file, place + 1)
        if place < 0:
            return


def _member(file: BinaryIO) -> tuple[bytes, int, str]:
    """Decompress one gzip member: its bytes, the offset after it, and a fault."""
    place, unzip = file.tell(), zlib.decompressobj(31)
    parts: list[bytes] = []
    size = 0
    while not unzip.eof:
        piece = unzip.unconsumed_tail or file.read(PIECE)
        if not piece:
            return b"", place, "cut off" if file.tell() > place else ""
        try:
            data = unzip.decompress(piece, PIECE)
        except zlib.error:
            return b"", place, "damaged gzip member"
        size += len(data)
        if size <= MOST_BYTES:
            parts.append(data)
        else:
            parts.clear()  # read on without keeping, to find the end of the member
    after = file.tell() - len(unzip.unused_data)
    return b"".join(parts), after, "record too large" if size > MOST_BYTES else ""


def _next_member(file: BinaryIO, place: int) -> int:
    """Offset of the next beginning of a gzip member, -1 if there is none."""
    file.seek(place)
    before = b""
    while piece := file.read(PIECE):
        window, end = before + piece, file.tell()
        found = window.find(_MEMBER)
        while found >= 0:
            # The three bytes alone also occur within compressed data.
            if _begins_record(file, start := end - len(window) + found):
                return start
            found = window.find(_MEMBER, found + 1)
        file.seek(end)
        before = window[-2:]
    return -1


def _begins_record(file: BinaryIO, place: int) -> bool:
    file.seek(place)
    try:
        return zlib.decompressobj(31).decompress(file.read(512), 8).startswith(b"WARC/")
    except zlib.error:
        return False


def _parsed(data: bytes, offset: int) -> Iterator[Record]:
    """The records of a decompressed member, as a rule one."""
    place = 0
    while place < len(data):
        begin = _BEGIN.search(data, place)
        if begin is None:
            if data[place:].strip():
                yield Record(offset, fault="no WARC header")
            return
        headers, start = _headers(data, begin.end())
        length = headers.get("content-length", "")
        if not length.isdecimal():
            yield Record(offset, headers, fault="no Content-Length")
            place = start
            continue
        content = data[start : start + int(length)]
        yield Record(offset, headers, content, fault="cut off" if len(content) < int(length) else "")
        place = start + int(length)


def _plain(file: BinaryIO) -> Iterator[Record]:
    """Records of an uncompressed file; a large one is passed over without reading it."""
    place, end = file.tell(), file.seek(0, 2)
    while place < end:
        file.seek(place)
        head = file.read(PIECE)
        begin = _BEGIN.search(head)
        if begin is None:
            if head.strip() and len(head) < PIECE:
                yield Record(place, fault="no WARC header")
            place += max(1, len(head) - 16)  # a begin may lie across the border of two reads
            if len(head) < PIECE:
                return
            continue
        headers, start = _headers(head, begin.end())
        place += begin.start()
        start -= begin.start()
        length = headers.get("content-length", "")
        if not length.isdecimal():
            yield Record(place, headers, fault="no Content-Length")
            place += start
            continue
        if int(length) > MOST_BYTES:
            yield Record(place, headers, fault="record too large")
        else:
            file.seek(place + start)
            content = file.read(int(length))
            yield Record(place, headers, content, fault="cut off" if len(content) < int(length) else "")
        place += start + int(length)


def _headers(data: bytes, place: int) -> tuple[dict[str, str], int]:
    """Header lines from `place` up to an empty line, by lower-case name, and the offset after it."""
    found = re.compile(rb"\r?\n\r?\n").search(data, max(0, place - 2))
    end, after = (found.start(), found.end()) if found else (len(data), len(data))
    headers = {}
    for line in data[place:end].splitlines():
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return headers, after


@dataclass(frozen=True)
class Response:
    """The HTTP response in a record; `fault` is set where its body cannot be used."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: str = ""

    @property
    def media_type(self) -> str:
        """Such as text/html, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def response(content: bytes) -> Response:
    """Parse the content of a `response` record: status, headers, body without chunks and compression."""
    line, _, _ = content.partition(b"\n")
    parts = line.split()
    status = int(parts[1]) if len(parts) > 1 and parts[0].startswith(b"HTTP/") and parts[1].isdigit() else 0
    headers, start = _headers(content, len(line) + 1)
    body = content[start:]
    if headers.get("transfer-encoding", "").lower() == "chunked" and (joined := _unchunked(body)) is not None:
        body = joined  # crawlers that store the body without its chunks keep the header: then it stays as it is
    encoding = headers.get("content-encoding", "").lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        return Response(status, headers, *_inflated(body))
    fault = f"content encoding {encoding}"[:40] if encoding not in ("", "identity") else ""
    return Response(status, headers, body, fault)


def _unchunked(body: bytes) -> bytes | None:
    parts: list[bytes] = []
    place = 0
    while True:
        line = re.compile(rb"([0-9a-fA-F]+)[^\r\n]*\r?\n").match(body, place)
        if line is None:
            return None
        size = int(line[1], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[line.end() : line.end() + size])
        place = line.end() + size
        place += 2 if body[place : place + 2] == b"\r\n" else 1


def _inflated(body: bytes) -> tuple[bytes, str]:
    for bits in (47, -15):  # gzip or zlib by their headers, then deflate without one
        unzip = zlib.decompressobj(bits)
        try:
            data = unzip.decompress(body, MOST_BYTES)
        except zlib.error:
            continue
        return (b"", "record too large") if unzip.unconsumed_tail else (data, "")
    # Some crawlers store the inflated body and keep the header.
    return (body, "") if body.lstrip()[:1] == b"<" else (b"", "damaged content encoding")
