"""Resumable JSONL: one record per finished item, on disk before the next item begins.

A process may be killed at any byte. An appended line is flushed to the disk (fsync) before `append` returns; a last
line without its end is removed when the file is opened again, and its item is done again. Settings lie beside the
file, so that a second call with others cannot mix two kinds of records.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megabagel.config.reading import read_file
from megabagel.data.files import write_atomic
from megabagel.errors import UserError, printable

logger = logging.getLogger(__name__)

Record = dict[str, Any]

DRAWN, IMAGES = "drawn.jsonl", "images"
"""In the folder of a pipeline: records of drawn pictures, and their files."""


class Journal:
    """The finished items of one stage.

    Args:
        path: the JSONL file; created with its folder on the first record.
        key: field that names an item; each item has one record.
        settings: JSON values that all records of the file share.

    Raises:
        UserError: the file was begun with other settings, is damaged before its last line, or cannot be read.
    """

    def __init__(self, path: Path, key: str, settings: Mapping[str, Any]) -> None:
        self.path, self.key = path, key
        self._check_settings(json.loads(json.dumps(settings)))
        self.records = {str(record[key]): record for record in read_records(path, key, repair=True)}

    def __contains__(self, item: str) -> bool:
        return item in self.records

    def append(self, record: Record) -> None:
        """Write one record; after a failed write the file ends with the record before.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        item = str(record[self.key])
        assert item not in self.records, item
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
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
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}). What is finished stays: free some space and start "
                "the same command again."
            ) from error
        self.records[item] = record

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.path.with_suffix(".settings.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
                return
            found = json.loads(read_file(path, 2**24))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read or written ({error}); remove it with {self.path.name}") from error
        changed = [name for name in sorted({*found, *settings}) if found.get(name) != settings.get(name)]
        if changed:
            shown = ", ".join(f"{n} = {found.get(n)!r:.60}, now {settings.get(n)!r:.60}" for n in changed)
            raise UserError(
                f"{self.path}: was begun with {shown}. Use the same settings, or another folder; remove "
                f"{self.path.name} and {path.name} to begin anew."
            )


def append_to(journals: Sequence[Journal], record: Record) -> None:
    """Append to the journal that rank 0 alone has opened (`ranks.from_first`)."""
    (journal,) = journals
    journal.append(record)


def read_records(path: Path, key: str, repair: bool = False) -> Iterator[Record]:
    """Records of a JSONL file, each item once; none if there is no file.

    Args:
        path: the file.
        key: field that every record has.
        repair: remove a last line that was cut off. Without it the line is only left out.

    Raises:
        UserError: the file cannot be read, or a line before the last is no record.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    end = data.rfind(b"\n") + 1
    if end < len(data):
        logger.warning("%s: the last line was cut off; its item is done again", path)
        if repair:
            os.truncate(path, end)
    seen: set[str] = set()
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            record = json.loads(line)
            item = str(record[key])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is no record with a field {key!r} ({printable(str(error))[:80]}); remove the "
                "line, and its item is done again"
            ) from error
        if item in seen:
            logger.warning("%s: line %d repeats %s; the first record counts", path, number, item)
            continue
        seen.add(item)
        yield record
