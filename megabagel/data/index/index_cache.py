"""On-disk cache of shard scans: one file per shard, which is used only if it is undamaged and up to date.

A cache file lies in `.index/` beside its shard (or in `data.index_dir`). One file per shard means that interrupted
indexing resumes at the next shard, and that new shards cost only their own scan. The first line of a file is JSON: the
state of the shard, the skipped samples, and the SHA-256 of the rest, which holds the arrays of `document_table.py`.

A scan is up to date if the size and modification time of the shard are those recorded. If only the time differs, the
shard is read and its BLAKE2 digest decides, which is far cheaper than a scan because nothing is decoded.
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

FORMAT = 4
"""Version of the scan and of its file format. Increase it whenever a scan of the same shard would give another result
or is stored in another way."""
# Other names than those of the fields, kept because existing cache files have them.
ON_DISK = {"documents": "documents_D", "items": "items_I", "keys": "keys_B", "texts": "texts_B"}
"""Names of a table's arrays in the header of a cache file."""

FOLDER = ".index"
MOST_BYTES = 2**36
"""Largest cache file that is read: 64 GiB hold the index of more than a billion items."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that was left out: its shard and key, the reason by which it is counted, and details."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return printable(f"{self.shard}: {self.key or 'the end of the shard'}: {self.reason}{detail}")


@dataclass(frozen=True)
class State:
    """State of a shard when it was scanned: size in bytes, modification time in ns, BLAKE2 digest of its contents."""

    size: int
    changed: int
    digest: str

    @classmethod
    def of(cls, shard: Path) -> "State":
        """The current state of a shard; reads the whole file for the digest.

        Raises:
            UserError: the shard is missing or cannot be read.
        """
        size, changed = _stat(shard)
        return cls(size, changed, _digest(shard))


@dataclass(frozen=True)
class Scan:
    """Result of scanning one shard, independent of the task: documents with declared roles, and skipped samples."""

    table: Table
    skipped: tuple[Skip, ...]
    state: State
    unused: Mapping[str, int]
    """Fields, columns and files that no layout uses, with the number of samples that have each."""


def file_of(shard: Path, folder: Path | None, how: Mapping[str, Any]) -> Path:
    """Path of the cache file of a shard.

    Args:
        shard: path of the shard.
        folder: common folder of all cache files, or None for `.index` beside the shard.
        how: settings of the scan (tokenizer, image folder, ...), as JSON values; each combination has its own file.
    """
    # In a common folder the whole path distinguishes shards of the same name. Beside the shard its name suffices, and
    # the cache stays valid when the folder is moved.
    place = str(shard) if folder else shard.name
    tag = hashlib.sha256(json.dumps([FORMAT, place, how], sort_keys=True).encode()).hexdigest()[:16]
    return (folder or shard.parent / FOLDER) / f"{shard.name}-{tag}.index"


def load(path: Path, shard: Path, *, check: bool = False) -> Scan | None:
    """Load the cached scan of a shard.

    Args:
        path: the cache file.
        shard: the shard, compared with the recorded state.
        check: compare the digest of the shard even if its size and modification time are unchanged.

    Returns:
        The scan, or None if there is none, the shard has changed, or the cache file is damaged (both are logged).

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
    # Same contents with another time (a copied shard): record the new time, so that the next start skips the digest.
    if changed != scan.state.changed:
        scan = replace(scan, state=State(size, changed, scan.state.digest))
        save(path, scan)
    return scan


def save(path: Path, scan: Scan) -> None:
    """Write a scan atomically. A folder that cannot be written is not an error: the next start scans again."""
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
    """Fields of the first line of a cache file."""

    state: tuple[Count, int, str]
    skipped: tuple[tuple[str, str, str, str], ...]
    lengths: dict[str, Count]
    sha256: str
    unused: dict[str, Count]


def _read(path: Path) -> bytes:
    """Read a whole cache file. Raises OSError if it cannot be read or is no regular file."""
    return read_file(path, MOST_BYTES)


def _unpack(fields: _Head, body: bytes) -> Scan:
    """Build a scan from the header and the body of a cache file. Raises ValueError if they do not fit together."""
    columns, offset = {}, 0
    for name, kind in TYPES.items():
        length = fields.lengths.get(ON_DISK[name], -1)
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
