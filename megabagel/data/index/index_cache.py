"""The cache of an index: what a scan of one shard found, in one file that is either current and sound or built anew.

A cache file lies in `.index/` beside its shard (or in a folder of your choice): indexing that was interrupted goes on
where it stopped, and new shards cost only their own scan. The first line is JSON: the state of the shard, the samples
that are not used, and the digest of the rest, which holds the columns of `table.py`.

A shard is current if its size and time of change are those on record. If only the time differs, its contents are read
and their BLAKE2 digest decides, which is far cheaper than a scan: nothing is decoded.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megabagel.config.reading import read_file
from megabagel.config.typed_json import Count, parse, read_as
from megabagel.data.files import write_atomic
from megabagel.data.index.document_table import TYPES, Table
from megabagel.errors import UserError, printable
from megabagel.log import RANK0

logger = logging.getLogger(__name__)

FORMAT = 3
"""Raised whenever a scan of the same shard would find something else, or is written in another way."""
ON_DISK = {"documents": "documents_D", "items": "items_I", "keys": "keys_B", "texts": "texts_B"}
"""Names of a table's arrays in the header of format 2."""

FOLDER = ".index"
MOST_BYTES = 2**36
"""Of a cache file: 64 GiB are the index of more than a billion items."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that is not used: shard and key name it, `reason` can be counted, `detail` says more."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return printable(f"{self.shard}: {self.key or 'the end of the shard'}: {self.reason}{detail}")


@dataclass(frozen=True)
class State:
    """A shard as it was when it was scanned: bytes, time of change in ns, digest of the contents."""

    size: int
    changed: int
    digest: str

    @classmethod
    def of(cls, shard: Path) -> "State":
        """The state of a shard, all of which is read.

        Raises:
            UserError: the shard is missing or cannot be read.
        """
        size, changed = _stat(shard)
        return cls(size, changed, _digest(shard))


@dataclass(frozen=True)
class Scan:
    """What one shard holds, before any task: documents with roles as declared, and what was skipped."""

    table: Table
    skipped: tuple[Skip, ...]
    state: State
    unused: Mapping[str, int]
    """Fields, columns and files for which samples have no use, and how many samples have each."""


def file_of(shard: Path, folder: Path | None, how: Mapping[str, Any]) -> Path:
    """The cache file of a shard scanned in one way; other ways (another tokenizer, ...) have files of their own.

    In a `folder` shared by many shards, the file is that of this path.
    """
    place = str(shard) if folder else shard.name
    tag = hashlib.sha256(json.dumps([FORMAT, place, how], sort_keys=True).encode()).hexdigest()[:16]
    return (folder or shard.parent / FOLDER) / f"{shard.name}-{tag}.index"


def load(path: Path, shard: Path, *, check: bool = False) -> Scan | None:
    """The cached scan, or None where there is none, the shard has changed, or the file is damaged (said in the log).

    With `check` the contents of the shard are compared although nothing suggests a change.

    Raises:
        UserError: the shard is missing.
    """
    size, changed = _stat(shard)
    try:
        head, body = _read(path).split(b"\n", 1)
        fields = read_as(_Head, parse(head))
        if fields.sha256 != hashlib.sha256(body).hexdigest():
            raise ValueError("the digest does not match")
        scan = _unpack(fields, body)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("index cache %s is damaged (%s): indexing %s again", path, error, shard, extra=RANK0)
        return None
    if size != scan.state.size:
        message = "%s changed since it was indexed (%d bytes, were %d): indexing again"
        logger.warning(message, shard, size, scan.state.size, extra=RANK0)
        return None
    if (check or changed != scan.state.changed) and _digest(shard) != scan.state.digest:
        message = "%s changed since it was indexed (same size, other contents): indexing again"
        logger.warning(message, shard, extra=RANK0)
        return None
    if changed != scan.state.changed:
        scan = replace(scan, state=State(size, changed, scan.state.digest))
        save(path, scan)
    return scan


def save(path: Path, scan: Scan) -> None:
    """Write the scan atomically; a folder that cannot be written only costs the next start its time."""
    columns = {name: getattr(scan.table, name) for name in TYPES}
    body = b"".join(column.tobytes() for column in columns.values())
    fields = {
        "state": astuple(scan.state),
        "skipped": [astuple(skip) for skip in scan.skipped],
        "lengths": {ON_DISK[name]: len(column) for name, column in columns.items()},
        "sha256": hashlib.sha256(body).hexdigest(),
        "unused": dict(scan.unused),
    }
    try:
        write_atomic(path, json.dumps(fields).encode() + b"\n" + body)
    except OSError as error:
        logger.warning(
            "index cache %s cannot be written (%s): the next start will index again", path, error, extra=RANK0
        )


@dataclass(frozen=True)
class _Head:
    """The first line of a cache file."""

    state: tuple[Count, int, str]
    skipped: tuple[tuple[str, str, str, str], ...]
    lengths: dict[str, Count]
    sha256: str
    unused: dict[str, Count]


def _read(path: Path) -> bytes:
    """A cache file, which is as large as it has to be. Raises OSError, for what is no regular file too."""
    return read_file(path, MOST_BYTES)


def _unpack(fields: _Head, body: bytes) -> Scan:
    columns, offset = {}, 0
    for name, kind in TYPES.items():
        length = fields.lengths.get(name, -1)
        if not 0 <= length * kind.itemsize <= len(body) - offset:
            raise ValueError(f"{length} entries of {name} in {len(body)} bytes")
        columns[name] = np.frombuffer(body, kind, length, offset)
        offset += columns[name].nbytes
    table = Table(**columns)
    if problem := table.problem():
        raise ValueError(problem)
    return Scan(table, tuple(Skip(*skip) for skip in fields.skipped), State(*fields.state), fields.unused)


def _stat(shard: Path) -> tuple[int, int]:
    try:
        state = shard.stat()
    except OSError as error:
        raise UserError(f"{shard}: shard not found ({error.strerror}). Check data.root and data.sources.") from error
    return state.st_size, state.st_mtime_ns


def _digest(shard: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with shard.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise UserError(
            f"{shard}: cannot be read ({error}). Bring the shard back or remove it from data.sources."
        ) from error
    return digest.hexdigest()
