"""Append-only JSONL files: a record is on disk when `append` returns, so that a kill loses at most the item in work."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megabagel.errors import UserError

Record = dict[str, Any]
"""A JSON object."""


class Journal:
    """A JSONL file that is read once and then extended.

    A last line without a newline is what a kill left of a record in work: it is cut off. Any other line that is no
    JSON object is damage and refused by its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            whole = path.read_bytes().rpartition(b"\n")
            self._file.truncate(len(whole[0]) + len(whole[1]))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error}); choose a folder with space and rights") from error
        self.records = read_journal(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record and wait until it is on disk."""
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error}); free space and start again") from error
        self.records.append(dict(record))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> list[Record]:
    """Return the complete records of a JSONL file; none if it does not exist.

    Raises:
        UserError: a line that ends in a newline is no JSON object.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        record: Any = None
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: no JSON object ({line[:60]!r}). Remove the line; its item is done again."
            )
        records.append(record)
    return records


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
        raise UserError(f"{path}: cannot be written ({error}); free space and start again") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
