"""The cache of an index: what a scan of shards found, in one file that is either current and sound or built anew.

The first line holds the stamp (what the scan depends on) and the digest of the second, the second the scan as JSON.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.data.documents import Document, ImageItem, Item, Member, TextItem
from megabagel.data.files import write_atomic
from megabagel.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised whenever a scan of the same shards would find something else, or is written in another way."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that is not used: shard and key name it, `reason` can be counted, `detail` says more."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.shard}: {self.key or 'the end of the shard'}: {self.reason}{detail}"


@dataclass(frozen=True)
class Scan:
    """What shards hold, before any task: (shard number, document) pairs, roles as declared, and what was skipped."""

    documents: list[tuple[int, Document]]
    skipped: list[Skip]


def file_name(shards: Sequence[Path], tokenizer: str) -> str:
    """Name of the cache file for these shards and this tokenizer; other ones do not overwrite it."""
    names = "\0".join([tokenizer, *map(str, shards)])
    return f".index-{hashlib.sha256(names.encode()).hexdigest()[:16]}.json"


def stamp(shards: Sequence[Path], tokenizer: str, verify: bool) -> dict[str, Any]:
    """Everything that a scan depends on.

    Raises:
        UserError: a shard is missing.
    """
    try:
        states = [(path.name, path.stat()) for path in shards]
    except OSError as error:
        raise UserError(
            f"{error.filename}: shard not found ({error.strerror}). Check data.root and data.sources."
        ) from error
    return {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "verify": verify,
        "shards": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
    }


def load(path: Path, stamp: dict[str, Any]) -> Scan | None:
    """The cached scan, or None where there is none or it is stale or damaged (said in the log)."""
    try:
        head, body = path.read_bytes().split(b"\n")
        fields = json.loads(head)
        sound, current = fields["sha256"] == hashlib.sha256(body).hexdigest(), fields["stamp"] == stamp
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        sound = current = False
    if not (sound and current):
        logger.warning("index cache %s is %s: indexing again", path, "out of date" if sound else "damaged")
        return None
    return _unpack(json.loads(body))


def save(path: Path, stamp: dict[str, Any], scan: Scan) -> None:
    """Write the scan atomically; a folder that cannot be written only costs the next start its time."""
    body = json.dumps(_pack(scan), separators=(",", ":")).encode()
    head = json.dumps({"stamp": stamp, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    try:
        write_atomic(path, head + b"\n" + body)
    except OSError as error:
        logger.warning("index cache %s cannot be written (%s): the next start will index again", path, error)


def _pack(scan: Scan) -> dict[str, Any]:
    return {
        "documents": [[shard, doc.key, [_pack_item(item) for item in doc.items]] for shard, doc in scan.documents],
        "skipped": [[skip.shard, skip.key, skip.reason, skip.detail] for skip in scan.skipped],
    }


def _unpack(body: dict[str, Any]) -> Scan:
    return Scan(
        [(shard, Document(key, tuple(_unpack_item(row) for row in rows))) for shard, key, rows in body["documents"]],
        [Skip(*row) for row in body["skipped"]],
    )


def _pack_item(item: Item) -> list[Any]:
    """[role, n_ids, text or member] or [role, height, width, member]; a member is [shard, offset, size]."""
    if isinstance(item, TextItem):
        return [item.role, item.n_ids, item.source if isinstance(item.source, str) else _pack_member(item.source)]
    return [item.role, item.height, item.width, _pack_member(item.member)]


def _unpack_item(row: list[Any]) -> Item:
    if len(row) == 3:
        role, n_ids, source = row
        return TextItem(n_ids, source if isinstance(source, str) else Member(*source), role)
    role, height, width, member = row
    return ImageItem(height, width, Member(*member), role)


def _pack_member(member: Member) -> list[int]:
    return [member.shard, member.offset, member.size]
