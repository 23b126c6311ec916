"""Reader of web pages: folders of HTML files with their pictures beside them, and WARC files."""

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from megabagel.config.reading import read_file
from megabagel.curation.draft import Draft, plain_key
from megabagel.curation.partitions import Partition, files_below, in_groups, partitions_of
from megabagel.curation.read.html_page import read_page
from megabagel.curation.read.reader import Reader, Seen, check_folders
from megabagel.curation.read.warc import Record, records, response
from megabagel.data.files import MAX_IMAGE_BYTES
from megabagel.errors import UserError, is_transient

PAGES = (".html", ".htm", ".xhtml")
ARCHIVES = (".warc", ".warc.gz")
MAX_PAGE_BYTES = 2**24
HTML = ("text/html", "application/xhtml+xml")


def find(inputs: Sequence[Path], *, pages_per_partition: int) -> list[Partition]:
    """One partition per WARC file, and one per group of HTML files."""
    check_folders(inputs)
    groups: list[tuple[Path, Sequence[Path]]] = []
    for root in inputs:
        groups += [(root, [path]) for path in files_below(root, ARCHIVES)]
        groups += [(root, group) for group in in_groups(files_below(root, PAGES), pages_per_partition)]
    if not groups:
        places = ", ".join(map(str, inputs))
        raise UserError(f"--in {places}: no pages in it. Expected files ending in {', '.join(PAGES + ARCHIVES)}")
    return partitions_of(groups)


def read(partition: Partition, seen: Seen, *, pages_per_partition: int) -> Iterator[Draft]:
    """The main content of every page."""
    if partition.files[0].lower().endswith(ARCHIVES):
        yield from _archive(partition, seen)
    else:
        yield from _folder(partition, seen)


READER = Reader(find, read, {"pages_per_partition": 200})


def _folder(partition: Partition, seen: Seen) -> Iterator[Draft]:
    root = Path(partition.root)
    for number, (name, path) in enumerate(zip(partition.files, partition.paths, strict=True)):

        def load(source: str, folder: Path = path.parent) -> bytes | None:
            return _file(root, folder / unquote(urlsplit(source).path)) if not urlsplit(source).scheme else None

        try:
            html = decoded(read_file(path, MAX_PAGE_BYTES))
        except OSError as error:
            if is_transient(error):
                raise
            seen.records[f"page: {error.strerror}"] += 1
            continue
        yield from _page(_key(partition, number, path.stem), html, load, name, seen)


def _page(
    key: str, html: str, load: Callable[[str], bytes | None], source: str, seen: Seen, kind: str = "page"
) -> Iterator[Draft]:
    try:
        page = read_page(key, html, load, source)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if is_transient(error):
            raise
        seen.records[f"{kind}: raised"] += 1
        seen.fail(source, "read", error)
    else:
        seen.records[kind] += 1
        yield page.draft


def _file(root: Path, path: Path) -> bytes | None:
    """The file, if it lies under `root`."""
    try:
        path = path.resolve()
        return read_file(path, MAX_IMAGE_BYTES) if path.is_relative_to(root.resolve()) else None
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        return None


def _archive(partition: Partition, seen: Seen) -> Iterator[Draft]:
    """Pages of a WARC file; their pictures are read again by offset, those in other files count as missing.

    Two passes: a picture may come before its page or after it, and keeping all pictures would not be bounded.
    """
    (path,) = partition.paths
    pictures: dict[str, int] = {}
    for record in records(path):
        if _kind(record).startswith(("response: image/", "resource: image/")):
            pictures.setdefault(record.url, record.offset)
    for number, record in enumerate(records(path)):
        kind = _kind(record)
        if kind.partition(": ")[2] not in HTML:
            seen.records[kind] += 1
            continue
        body, charset = _body(record)

        def load(source: str, page: str = record.url) -> bytes | None:
            url = urldefrag(urljoin(page, source)).url
            return _picture(path, url, pictures[url]) if url in pictures else None

        stem = PurePosixPath(urlsplit(record.url).path).stem
        yield from _page(_key(partition, number, stem), decoded(body, charset), load, record.url, seen, kind)


def _kind(record: Record) -> str:
    """What a record is: its type, and for a response its media type, or the reason why it is of no use."""
    if record.fault:
        return f"{record.type or 'record'}: {record.fault}"
    if record.type == "resource":
        return f"resource: {record.headers.get('content-type', 'no type').partition(';')[0].strip().lower()}"[:60]
    if record.type != "response":
        return record.type or "record: no type"
    if not record.url.startswith(("http://", "https://")):
        return "response: not of HTTP"
    found = response(record.content)
    if found.fault:
        return f"response: {found.fault}"
    if found.status != 200:
        return f"response: status {found.status}"
    return f"response: {found.media_type or 'no type'}"[:60] if found.body else "response: empty"


def _body(record: Record) -> tuple[bytes, str]:
    """Content and declared charset."""
    if record.type == "resource":
        return record.content, _charset(record.headers.get("content-type", ""))
    found = response(record.content)
    return found.body, _charset(found.headers.get("content-type", ""))


def _picture(path: Path, url: str, offset: int) -> bytes | None:
    for record in records(path, offset):  # a member may hold several
        if record.url == url and _kind(record).partition(": ")[2].startswith("image/"):
            return _body(record)[0]
    return None


def _charset(content_type: str) -> str:
    found = re.search(r"charset=[\"']?([\w.:-]+)", content_type, re.IGNORECASE)
    return found[1] if found else ""


def decoded(data: bytes, declared: str = "") -> str:
    """Text of a page: by its byte order mark, the HTTP header, its own declaration, else UTF-8, else Windows-1252."""
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    names = [name for mark, name in marks if data.startswith(mark)] + [declared]
    if own := re.search(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", data[:2048], re.IGNORECASE):
        names.append(own[1].decode())
    for name in [*names, "utf-8"]:
        try:
            return data.decode(name) if name else data.decode("utf-8")
        except (LookupError, UnicodeError):
            continue
    return data.decode("cp1252", "replace")


def _key(partition: Partition, number: int, stem: str) -> str:
    return f"{partition.name}-{number:06d}-{plain_key(stem)[:40]}"
