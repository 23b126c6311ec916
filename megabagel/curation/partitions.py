"""Partitions: the units of work of a run, each a few input files whose documents become shards of their own."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megabagel.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Some input files of one kind."""

    name: str
    """Number with six digits, in the order of the inputs; part of the names of shards and keys of samples."""
    root: str
    """Input folder."""
    files: tuple[str, ...]
    """Paths below `root`, in order."""
    digest: str
    """Identity of the files: names, sizes and times of change."""

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [Path(self.root) / name for name in self.files]


def partitions_of(groups: Iterable[tuple[Path, Sequence[Path]]]) -> list[Partition]:
    """Number groups of files.

    Args:
        groups: (input folder, files below it) in order.

    Raises:
        UserError: a file vanished or cannot be read.
    """
    found = []
    for number, (root, paths) in enumerate(groups):
        names = tuple(path.relative_to(root).as_posix() for path in paths)
        try:
            about = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in _stats(names, paths)]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check the input folder") from error
        found.append(Partition(f"{number:06d}", str(root), names, digest_of(about)))
    return found


def _stats(names: Sequence[str], paths: Sequence[Path]) -> Iterator[tuple[str, os.stat_result]]:
    return ((name, path.stat()) for name, path in zip(names, paths, strict=True))


def files_below(root: Path, extensions: Sequence[str]) -> list[Path]:
    """Files under a folder by their extensions, in order; hidden files and folders are left out."""
    found = []
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.name.lower().endswith(tuple(extensions)) and path.is_file():
            found.append(path)
    return sorted(found)


def in_groups(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    """Files in groups of `size`; the last one has what is left."""
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def digest_of(value: object) -> str:
    """128-bit digest of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
