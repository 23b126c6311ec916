"""Checksums per block of a file: any part of a file is verified by reading little more than the part.

SHA-256, because it is one of the two fast hashes of the standard library on processors with instructions for it (1.4
GB/s on one core, blake2b 0.9: docs/checkpoints.md#what-it-costs). Blocks are independent, so several threads check a
file.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megabagel.errors import UserError

BLOCK = 2 << 20
"""Bytes per checksum."""
KEPT = 8
"""Blocks that a reader caches: weights, moments and averages of a tensor lie in different blocks."""
THREADS = 4
"""Reading threads per rank; Python's lock is released while a block is read and hashed."""
ANOTHER = (
    "Name another checkpoint with run.resume or run.init_from, or remove this one: run.resume=auto then takes the one "
    "before it."
)
"""The next step after a damaged file."""


@dataclass(frozen=True)
class Sums:
    """Expected size of a file, and the SHA-256 of each BLOCK bytes."""

    size: int
    blocks: tuple[str, ...]


def checksum(content: bytes | memoryview) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sums_of_file(path: Path) -> Sums:
    """Compute the checksums of a file on disk. Raises OSError."""
    with path.open("rb") as file:
        blocks = tuple(checksum(block) for block in iter(lambda: file.read(BLOCK), b""))
    return Sums(path.stat().st_size, blocks)


class SummedWriter:
    """Sequential writer that computes checksums and flushes to the disk. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._summer = ThreadPoolExecutor(1)
        self._size, self._room, self._hash = 0, BLOCK, hashlib.sha256()
        self._blocks: list[str] = []

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes; large pieces are written by one thread while another hashes them."""
        content = memoryview(content)
        self._size += len(content)
        while content:
            part, content = content[: self._room], content[self._room :]
            if len(part) < BLOCK // 8:
                self._hash.update(part)
                self._file.write(part)
            else:
                summed = self._summer.submit(self._hash.update, part)
                self._file.write(part)
                summed.result()
            self._room -= len(part)
            if not self._room:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._hash.hexdigest())
        self._room, self._hash = BLOCK, hashlib.sha256()

    def finish(self) -> Sums:
        """Flush the file to the disk and return its checksums."""
        if self._room < BLOCK:
            self._end_block()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return Sums(self._size, tuple(self._blocks))

    def close(self) -> None:
        """Close the file, finished or not."""
        self._summer.shutdown()
        self._file.close()


class SummedReader:
    """Random-access reader that returns only verified bytes. Raises UserError for damage."""

    def __init__(self, path: Path, sums: Sums) -> None:
        self.path, self._sums = path, sums
        self._blocks: dict[int, memoryview] = {}
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}). {ANOTHER}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop)."""
        content = bytearray(stop - start)
        self.read_into(start, memoryview(content))
        return bytes(content)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer from `start` on. Whole blocks are read in place, by several threads."""
        whole = []
        while buffer:
            number, inside = divmod(start, BLOCK)
            size = min(BLOCK, self._sums.size - number * BLOCK)
            if not inside and len(buffer) >= size:
                whole.append((number, buffer[:size]))
                count = size
            else:
                part = self._kept(number, size)[inside : inside + len(buffer)]
                count = len(part)
                buffer[:count] = part
            start, buffer = start + count, buffer[count:]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda block: self._fetch(*block), whole))

    def _kept(self, number: int, size: int) -> memoryview:
        """Return a block that is needed in part; the last used ones are cached for neighbouring parts."""
        block = self._blocks.pop(number, None)
        if block is None:
            block = memoryview(bytearray(size))
            self._fetch(number, block)
        self._blocks[number] = block
        if len(self._blocks) > KEPT:
            del self._blocks[next(iter(self._blocks))]
        return block

    def check(self, number: int) -> None:
        """Read one block and compare its checksum."""
        self._fetch(number, memoryview(bytearray(min(BLOCK, self._sums.size - number * BLOCK))))

    def _fetch(self, number: int, buffer: memoryview) -> None:
        """Read a whole block and compare its checksum."""
        try:
            got, at = 0, number * BLOCK
            while got < len(buffer) and (count := os.preadv(self._file.fileno(), [buffer[got:]], at + got)):
                got += count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}). {ANOTHER}") from error
        if got < len(buffer) or checksum(buffer) != self._sums.blocks[number]:
            found = "ends" if got < len(buffer) else "was changed: its checksum is not that of manifest.json"
            raise UserError(
                f"{self.path}: {found} in bytes {at:,} to {at + len(buffer):,}, expected what was written. {ANOTHER}"
            )


def check_files(files: dict[Path, Sums], rank: int = 0, ranks: int = 1) -> None:
    """Compare all checksums of files: share `rank` of `ranks` of the blocks. Raises UserError."""
    mine = [(path, number) for path, sums in files.items() for number in range(len(sums.blocks))][rank::ranks]

    def check(some: list[tuple[Path, int]]) -> None:
        for reader, number in _opened(files, some):
            reader.check(number)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, (mine[first::THREADS] for first in range(THREADS))))


def _opened(files: dict[Path, Sums], blocks: list[tuple[Path, int]]) -> Iterator[tuple[SummedReader, int]]:
    """(reader, block), each file opened once."""
    reader = None
    try:
        for path, number in blocks:
            if reader is None or reader.path != path:
                if reader is not None:
                    reader.close()
                reader = SummedReader(path, files[path])
            yield reader, number
    finally:
        if reader is not None:
            reader.close()
