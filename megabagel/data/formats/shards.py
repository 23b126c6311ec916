"""WebDataset shards: plain tar files in which the files of one sample lie together and share a key.

Reading goes by offset: the headers of a shard are walked once, then each file is one `pread`.
"""

import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from megabagel.data.documents import Member
from megabagel.data.tar import NotTar, TarFile, walk
from megabagel.errors import UserError

OPEN_SHARDS = 256
"""Most shards that a process holds open, of all its sources: data sets have more shards than it may have open files."""


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: the key ends at the FIRST dot of the base name.

    >>> split_name("birds/000.0.PNG")
    ('birds/000', '0.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def list_files(shard: Path) -> tuple[list[TarFile], str | None]:
    """The files of a shard, and what is wrong with its end (None for a sound shard); see `tar.walk`.

    The last file of a damaged shard may be cut off, and further files of its sample may be lost.

    Raises:
        UserError: the shard is missing, unreadable or not an uncompressed tar.
    """
    try:
        with shard.open("rb") as file:
            return walk(file, shard.stat().st_size)
    except (OSError, NotTar) as error:
        raise UserError(
            f"{shard}: cannot be read as a shard ({error}). Expected an uncompressed tar of samples;"
            " `megabagel data prepare` builds such shards."
        ) from error


def write_shards(
    folder: Path, name: str, samples: Iterable[tuple[str, Mapping[str, bytes]]], samples_per_shard: int
) -> list[Path]:
    """Write (key, {extension: bytes}) samples as `folder/name-000000.tar`, ... and return the paths.

    The bytes of the shards depend on the samples alone: no time, no owner.

    Raises:
        OSError: the folder cannot be written.
    """
    paths = []
    for number, group in groupby(enumerate(samples), key=lambda numbered: numbered[0] // samples_per_shard):
        paths.append(folder / f"{name}-{number:06d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for _, (key, files) in group:
                for extension, data in files.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


class ShardReader:
    """Reads members of a list of shards; files are opened when first needed. Threads may share a reader."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = tuple(shards)
        self._mine = object()

    def read(self, member: Member) -> bytes:
        """The bytes of one member.

        Raises:
            UserError: the shard is gone or shorter than when it was indexed.
        """
        shard = self.shards[member.shard]
        try:
            data = b"".join(_pieces(_open(self._mine, shard), member))
        except OSError as error:
            raise UserError(
                f"{shard}: cannot be read ({error}). Bring the shard back or remove it from data.sources."
            ) from error
        if len(data) != member.size:
            raise UserError(
                f"{shard}: {len(data)} of {member.size} bytes at offset {member.offset}. The shard changed while it was"
                " in use; start again, so that it is indexed anew."
            )
        return data


class _Descriptor:
    """An open file, closed when nobody holds it any more: neither the cache nor a thread that is reading."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):  # not after a failed open
            os.close(self.number)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(reader: object, path: Path) -> _Descriptor:
    """A reader made later opens a shard anew: it may have been replaced."""
    return _Descriptor(path)


def _pieces(file: _Descriptor, member: Member) -> Iterator[bytes]:
    """One pread, or several where the system returns less than was asked for (above 2 GiB, on some file systems)."""
    done = 0
    while piece := os.pread(file.number, member.size - done, member.offset + done):
        yield piece
        done += len(piece)
