"""Small sites of pages with pictures, as folders and as WARC files."""

import gzip
from collections.abc import Mapping
from pathlib import Path

from tests.support.pictures import file_of, noise

SENTENCE = "This is what you see in the picture number {}, and it is easy to use for a beginner. "
SITE = "http://site.example/"


def site(root: Path, pages: int = 12, pictures: int = 3) -> Path:
    """A folder of English pages with different pictures; every fourth has too few, every fifth is German."""
    for number in range(pages):
        folder = root / f"part{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        count = 1 if number % 4 == 3 else pictures
        body = []
        for n in range(count):
            name = f"picture{number}_{n}.png"
            (folder / name).write_bytes(file_of(noise(160, 160, seed=100 * number + n)))
            words = "Der Hund und die Katze sind nicht in dem Haus, das ist von mir. " if number % 5 == 4 else SENTENCE
            body.append(f'<p>{words.format(n)}</p><img src="{name}" alt="Picture {n} of page {number}">')
        html = f"<html><body><h1>Page {number}</h1>{''.join(body)}<p>{SENTENCE.format('last')}</p></body></html>"
        (folder / f"page{number:02d}.html").write_text(html)
    return root


def warc_of(root: Path, zipped: bool = True, extra: bytes = b"") -> bytes:
    """All files of a folder as the responses of a crawl; every record is a gzip member of its own."""
    types = {".html": "text/html; charset=utf-8", ".png": "image/png"}
    found = [record("warcinfo", {}, b"software: test\r\n")]
    for path in sorted(path for path in root.rglob("*") if path.suffix in types):
        url = SITE + path.relative_to(root).as_posix()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {types[path.suffix]}\r\n\r\n".encode()
        found.append(record("request", {"WARC-Target-URI": url}, b"GET / HTTP/1.1\r\n\r\n"))
        found.append(record("response", {"WARC-Target-URI": url}, head + path.read_bytes()))
    return b"".join(gzip.compress(data, mtime=0) if zipped else data for data in found) + extra


def record(kind: str, headers: Mapping[str, str], content: bytes) -> bytes:
    """A WARC record."""
    named = {"WARC-Type": kind, **headers, "Content-Length": str(len(content))}
    return (
        b"WARC/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in named.items()).encode() + b"\r\n" + content + b"\r\n\r\n"
    )
