"""WebDataset shards: uncompressed tar files in which the files of a sample are adjacent and share a key.

The headers of a shard are read once, at indexing; after that each file is read with one `pread` at its offset.
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
"""Most shards that a process keeps open, over all sources: a data set may have more shards than the limit of open
files."""


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into key and extension; the key ends at the FIRST dot of the base name.

    >>> split_name("birds/000.0.PNG")
    ('birds/000', '0.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def list_files(shard: Path) -> tuple[list[TarFile], str | None]:
    """List the files of a shard; see `tar.walk`.

    Returns:
        The files, and a description of the damage at the end of the shard (None for an intact one). The last file of a
        damaged shard may be cut off, and further files of its sample may be missing.

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
    """Write samples as `folder/name-000000.tar`, ...

    Args:
        folder: existing folder.
        name: prefix of the file names.
        samples: (key, {extension: bytes}) of every sample.
        samples_per_shard: samples in every shard but the last.

    Returns:
        Paths of the shards. Their bytes depend on the samples alone: no times or owners are stored.

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
    """Reads members of a list of shards; files are opened on first use. Thread-safe."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = tuple(shards)
        # Part of the key of open files: a later reader opens a shard anew, because it may have been replaced.
        self._mine = object()

    def read(self, member: Member) -> bytes:
        """Read the bytes of one member.

        Raises:
            UserError: the shard is missing, or shorter than when it was indexed.
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
    """An open file that is closed when its last reference goes: the cache's, or that of a thread that is reading.

    Closing it on eviction from the cache would break a read that another thread has started.
    """

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):  # not after a failed open
            os.close(self.number)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(reader: object, path: Path) -> _Descriptor:
    """The open file of a shard. One cache for all readers, so that OPEN_SHARDS bounds the whole process."""
    return _Descriptor(path)


def _pieces(file: _Descriptor, member: Member) -> Iterator[bytes]:
    """Read a member with one pread, or several if the system returns less (above 2 GiB, or on some file systems)."""
    done = 0
    while piece := os.pread(file.number, member.size - done, member.offset + done):
        yield piece
        done += len(piece)
