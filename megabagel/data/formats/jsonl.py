"""JSONL files: one record per line, found again by the byte offset of its line; images lie in a folder beside."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from megabagel.data.documents import Loose, Member, SampleError
from megabagel.data.files import image_fault
from megabagel.data.formats.records import Declared, Locate, declare, invalid, parse
from megabagel.errors import UserError


def lines(path: Path, shard: int, images: Path) -> Iterator[tuple[str, Callable[[], list[Declared]]]]:
    """(key, its items when called) for every line that is not blank, in order.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = Member(shard, offset, len(line))
                    yield f"line {number}", partial(_declare, line, place, in_folder(images))
                offset += len(line)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Bring the file back, or remove it from data.sources."
        ) from error


def in_folder(folder: Path) -> Locate:
    """Finds images by their path relative to a folder; paths that lead out of it are refused.

    Raises, when called: SampleError if there is no such file, UserError if there may be one that cannot be read.
    """

    def locate(where: str, name: Any) -> Loose:
        if not isinstance(name, str) or not name:
            raise invalid(where, "the path of an image", name)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise SampleError("path leaves the image folder", f"{where}: {name!r:.80} in {folder}")
        try:
            return Loose(name, (folder / name).stat().st_size)
        except OSError as error:
            raise image_fault(folder / name, f"{where}: {name!r:.80} in {folder}", error) from error
        except ValueError as error:  # a name that no file can have
            raise SampleError("image is missing", f"{where}: {name!r:.80} in {folder}") from error

    return locate


def _declare(line: bytes, place: Member, locate: Locate) -> list[Declared]:
    return declare(parse(line), locate, place)
