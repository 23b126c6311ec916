"""Reader of one source: bytes and texts by location, for all shard formats."""

from collections.abc import Sequence
from pathlib import Path

from megabagel.config.reading import read_file
from megabagel.data.documents import Cell, Loose, Member, Passage, Place, SampleError
from megabagel.data.files import MAX_IMAGE_BYTES, image_fault
from megabagel.data.formats.parquet import ParquetReader, texts_of
from megabagel.data.formats.records import parse, passage
from megabagel.data.formats.shards import ShardReader


class Reader:
    """Reads from a list of shards and a folder of images. Thread-safe."""

    def __init__(self, shards: Sequence[Path], images: Path) -> None:
        self.shards, self.images = tuple(shards), images
        self.files, self.parquet = ShardReader(shards), ParquetReader(shards)

    def __reduce__(self) -> tuple[type["Reader"], tuple[Sequence[Path], Path]]:
        """Pickle as constructor arguments: another process opens its own files."""
        return Reader, (self.shards, self.images)

    def scanning(self) -> "Reader":
        """A reader with its own cache of parquet columns.

        Parallel scans of several shards would otherwise evict each other's columns from a shared cache.
        """
        other = Reader(self.shards, self.images)
        other.files = self.files
        return other

    def read(self, place: Place) -> bytes:
        """Read the bytes of one image, or of one file of a shard.

        Raises:
            UserError: a shard is missing or has changed since it was indexed, or an existing file cannot be read.
            SampleError: the image is too large, or an image in a file of its own is missing or has changed.
        """
        if place.size > MAX_IMAGE_BYTES:
            raise SampleError("image file too large", f"{place.size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
        match place:
            case Member():
                return self.files.read(place)
            case Cell():
                return self.parquet.read(place)
            case Loose(path, size):
                return self._file(self.images / path, size)

    def text(self, place: Passage) -> str:
        """Read a text of a record; raises as `read` does."""
        match place.place:
            case Member() as line:
                return passage(parse(self.files.read(line)), place.part)
            case Cell() as cell:
                return passage(texts_of(self.parquet, cell), place.part)

    def _file(self, path: Path, size: int) -> bytes:
        try:
            data = read_file(path, MAX_IMAGE_BYTES)
        except OSError as error:
            raise image_fault(path, f"{path}: {error.strerror}", error) from error
        if len(data) != size:
            raise SampleError("image changed", f"{path}: {len(data)} bytes, not {size}")
        return data
