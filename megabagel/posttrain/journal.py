"""Journals of the stages: one record per item, named by a key, made under settings that lie beside the file.

The settings keep a second call with others from mixing two kinds of records.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megabagel.config.reading import read_file
from megabagel.errors import UserError
from megabagel.journal import Journal as Lines
from megabagel.journal import Record, read_journal, write_json

logger = logging.getLogger(__name__)

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
        self._lines = Lines(path)
        self.records = dict(_keyed(path, self._lines.records, key))

    def __contains__(self, item: str) -> bool:
        return item in self.records

    def append(self, record: Record) -> None:
        """Write one record; raises as `megabagel.journal.Journal.append`."""
        item = str(record[self.key])
        assert item not in self.records, item
        self._lines.append(record)
        self.records[item] = record

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.path.with_suffix(".settings.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_json(path, settings)
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
    """Append to the journal that rank 0 alone has opened (in `from_rank0`)."""
    (journal,) = journals
    journal.append(record)


def read_records(path: Path, key: str) -> Iterator[Record]:
    """Records of a JSONL file, each item once; none if there is no file.

    Args:
        path: the file.
        key: field that every record has.

    Raises:
        UserError: the file cannot be read, or a line before the last is no record.
    """
    yield from (record for _, record in _keyed(path, read_journal(path), key))


def _keyed(path: Path, records: Sequence[Record], key: str) -> Iterator[tuple[str, Record]]:
    """Item and record, the first of each item."""
    seen: set[str] = set()
    for number, record in enumerate(records, 1):
        if key not in record:
            raise UserError(
                f"{path}, line {number}: no record with a field {key!r}; remove the line, and its item is done again"
            )
        item = str(record[key])
        if item in seen:
            logger.warning("%s: line %d repeats %s; the first record counts", path, number, item)
            continue
        seen.add(item)
        yield item, record
