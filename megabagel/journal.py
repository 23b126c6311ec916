"""Append-only JSONL files: a record is on disk when `append` returns, so that a kill loses at most the item in work."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megabagel.errors import UserError, printable

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""A JSON object."""


class Journal:
    """A JSONL file that is read once and then extended; created with its folder on the first record.

    Raises:
        UserError: it is damaged before its last line, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, read_journal(path, repair=True)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record and wait until it is on disk; after a failed write the file ends with the record before.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                end = file.tell()
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, end)
                    raise
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.records.append(dict(record))


def read_journal(path: Path, repair: bool = False) -> list[Record]:
    """Return the complete records of a JSONL file, in order; none if it does not exist.

    Args:
        path: the file.
        repair: remove a last line without a newline, which a kill left of a record in work. Otherwise it is left out.

    Raises:
        UserError: the file cannot be read, or a line that ends in a newline is no JSON object.
    """
    try:
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            logger.warning("%s: the last line was cut off; its item is done again", path)
            if repair:
                os.truncate(path, end)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read or mended ({error.strerror}); check its rights") from error
    records = []
    for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
        record: Any = None
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: no JSON object ({printable(repr(line[:60]))}). Remove the line; its item is "
                "done again."
            )
        records.append(record)
    return records


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}). What is finished stays: free some space and start the "
        "same command again."
    )


def read_all(paths: Iterable[Path]) -> list[Record]:
    """Return the records of several journals, such as those of the shards of one stage."""
    return [record for path in sorted(paths) for record in read_journal(path)]


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name, flush it and rename it: it is complete or absent."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _unwritable(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
