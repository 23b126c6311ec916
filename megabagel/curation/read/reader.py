"""Interface of readers, and the table of them that recipes name."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from megabagel.curation.draft import Draft
from megabagel.curation.partitions import Partition
from megabagel.data.formats.shards import list_files
from megabagel.data.tar import TarFile
from megabagel.errors import UserError, is_transient

MOST_NAMED = 1000
"""Failures of a partition that are named; all are counted."""


@dataclass
class Seen:
    """Account of what a reader met in a partition."""

    records: Counter[str] = field(default_factory=Counter)
    """Everything that was looked at, by kind, and by reason where no document came of it."""
    failures: list[dict[str, str]] = field(default_factory=list)
    """Documents that raised: source, step and error."""
    failed: int = 0

    def fail(self, source: str, step: str, error: BaseException) -> None:
        """Count a document that raised."""
        self.failed += 1
        if len(self.failures) < MOST_NAMED:
            what = f"{type(error).__name__}: {error}"[:300]
            self.failures.append({"source": source, "step": step, "error": what})


@dataclass(frozen=True)
class Reader:
    """A kind of input."""

    find: Callable[..., list[Partition]]
    """(input folders, **options) -> partitions. Raises UserError if there is nothing to read."""
    read: Callable[..., Iterator[Draft]]
    """(partition, seen, **options) -> drafts; whatever is no document is counted in `seen`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options with their defaults."""


READERS = {
    "web": "megabagel.curation.read.web",
    "pairs": "megabagel.curation.read.pairs",
    "samples": "megabagel.curation.read.samples",
    "video": "megabagel.curation.read.video",
}
"""Modules by the kind that a recipe names; each has a READER."""


def reader_of(kind: str) -> Reader:
    """The reader of a kind of `READERS`."""
    found = import_module(READERS[kind]).READER
    assert isinstance(found, Reader)
    return found


def shard_files(path: Path, name: str, seen: Seen) -> list[TarFile]:
    """Whole files of a tar shard; damage is counted, and a file that is no tar has none."""
    try:
        files, damage = list_files(path)
    except UserError as error:
        if is_transient(error):
            raise
        seen.records["shard: unreadable"] += 1
        seen.fail(name, "read", error)
        return []
    if damage is None:
        return files
    seen.records["shard: damaged at its end"] += 1
    return files[:-1]  # the last file may be cut off


def check_folders(inputs: Sequence[Path]) -> None:
    """Raise UserError if an input is not a folder."""
    for path in inputs:
        if not path.is_dir():
            raise UserError(f"--in {path}: no such folder")
