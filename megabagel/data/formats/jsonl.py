"""JSONL files: one record per line, addressed by byte offset; images are files in a folder of their own."""

import stat
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from megabagel.data.documents import Loose, Member, SampleError
from megabagel.data.files import image_fault
from megabagel.data.formats.records import MAX_RECORD_BYTES, Declared, Locate, declare, invalid, parse
from megabagel.errors import UserError


def lines(
    path: Path, shard: int, images: Path, unused: Counter[str]
) -> Iterator[tuple[str, Callable[[], list[Declared]]]]:
    """Iterate over the records of a file.

    Args:
        path: the JSONL file.
        shard: its number, for the locations of texts.
        images: folder to which image paths are relative.
        unused: is updated with the fields that no layout uses, as records are parsed.

    Returns:
        Iterator of (key, function that parses the record) for every line that is not blank, in order.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for number, (line, length) in enumerate(_pieces(file), 1):
                if length > MAX_RECORD_BYTES:
                    yield f"line {number}", partial(_refuse, length)
                elif line.strip():
                    place = Member(shard, offset, length)
                    yield f"line {number}", partial(_declare, line, place, in_folder(images), unused)
                offset += length
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Bring the file back, or remove it from data.sources."
        ) from error


def _pieces(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Iterate over (line, length in bytes). Of a line beyond MAX_RECORD_BYTES only the beginning is returned."""
    # Not `for line in file`, which would hold a line of any length in memory.
    while line := file.readline(MAX_RECORD_BYTES + 1):
        length, piece = len(line), line
        while len(piece) > MAX_RECORD_BYTES and not piece.endswith(b"\n"):
            piece = file.readline(MAX_RECORD_BYTES + 1)
            length += len(piece)
        yield line, length


def _refuse(length: int) -> list[Declared]:
    raise SampleError("record too long", f"{length:,} bytes; at most {MAX_RECORD_BYTES:,} are read")


def in_folder(folder: Path) -> Locate:
    """Return a function that locates images by their path relative to a folder; paths that leave it are refused.

    The function raises SampleError if there is no such file, and UserError if a file may exist but cannot be read.
    """

    def locate(where: str, name: Any) -> Loose:
        if not isinstance(name, str) or not name:
            raise invalid(where, "the path of an image", name)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise SampleError("path leaves the image folder", f"{where}: {name!r:.80} in {folder}")
        try:
            about = (folder / name).stat()
        except OSError as error:
            raise image_fault(folder / name, f"{where}: {name!r:.80} in {folder}", error) from error
        # A name that no file can have, such as one with an unpaired surrogate.
        except ValueError as error:
            raise SampleError("image is missing", f"{where}: {name!r:.80} in {folder}") from error
        if stat.S_ISDIR(about.st_mode):
            raise SampleError("image is missing", f"{where}: {name!r:.80} in {folder} is a folder")
        # Reading a FIFO or a device may block for ever.
        if not stat.S_ISREG(about.st_mode):
            raise SampleError("image is no regular file", f"{where}: {name!r:.80} in {folder}")
        return Loose(name, about.st_size)

    return locate


def _declare(line: bytes, place: Member, locate: Locate, unused: Counter[str]) -> list[Declared]:
    return declare(parse(line), locate, place, unused)
