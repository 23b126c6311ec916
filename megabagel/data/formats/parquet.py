"""Parquet files in the released layouts, with random access to cells (docs/bagel.md#data-layouts).

Parquet has no access to a single cell: its column has to be read for the whole row group. Columns are cached up to
HELD_BYTES, so files with small row groups (tens of MB) are much faster when samples are drawn in random order.
"""

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabagel.data.documents import Cell, SampleError
from megabagel.data.formats.records import PAIRS, Declared, declare, invalid, layout_of, left_over, named_layouts
from megabagel.data.formats.shards import OPEN_SHARDS
from megabagel.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

HELD_BYTES = 2**29
"""Size of a reader's column cache in bytes. The column in use is held whatever its size."""

_LAYOUTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("image", "captions"): ("binary", "string"),
    ("image_list", "instruction_list"): ("list<binary>", "list<list<string>>"),
    ("text",): ("string",),
    **{pair: ("binary", "string") for pair in PAIRS if pair[0] == "image"},
}
"""Columns of each layout, images first and the text last, and their types as `_kind` writes them."""


class ParquetReader:
    """Reads cells of a list of shards. Thread-safe."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = tuple(shards)
        self._metadata = lru_cache(maxsize=OPEN_SHARDS)(self._read_metadata)
        self._columns: OrderedDict[tuple[int, int, int], pa.ChunkedArray] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def value(self, cell: Cell) -> Any:
        """Python value of a cell, or of one element of the list in it.

        Raises:
            UserError: the shard is missing or has changed.
        """
        column = self.column(cell.shard, cell.group, cell.column)
        if cell.row >= len(column):
            raise UserError(f"{self.shards[cell.shard]}: no row {cell.row} in row group {cell.group}. {_CHANGED}")
        scalar = column[cell.row]
        return scalar.as_py() if cell.element < 0 else scalar[cell.element].as_py()

    def read(self, cell: Cell) -> bytes:
        """Bytes of an image; raises as `value` does."""
        data = self.value(cell)
        if len(data) != cell.size:
            where = f"row group {cell.group}, row {cell.row}"
            raise UserError(f"{self.shards[cell.shard]}: {where}: {len(data)} bytes, not {cell.size}. {_CHANGED}")
        return data

    def column(self, shard: int, group: int, column: int) -> "pa.ChunkedArray":
        """One column of one row group, from the cache or from the file."""
        place = shard, group, column
        with self._lock:
            if place in self._columns:
                self._columns.move_to_end(place)
                return self._columns[place]
        # Read without the lock, so that threads read different columns at the same time. Two of them may read the same
        # column; the second copy is dropped.
        values = self._read_column(shard, group, column)
        with self._lock:
            if place not in self._columns:
                self._columns[place] = values
                self._held += values.nbytes
            while self._held > HELD_BYTES and len(self._columns) > 1:
                self._held -= self._columns.popitem(last=False)[1].nbytes
        return values

    def forget(self) -> None:
        """Drop all cached columns."""
        with self._lock:
            self._columns.clear()
            self._held = 0

    def row_groups(self, shard: int) -> int:
        """Number of row groups of a shard."""
        return self._metadata(shard).num_row_groups

    def names(self, shard: int) -> list[str]:
        """Names of all columns of a shard.

        Raises:
            UserError: duplicate names, an unknown layout, or a column of another type than its layout has.
        """
        schema = self._schema(shard)
        doubled = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if doubled:
            raise UserError(
                f"{self.shards[shard]}: {len(doubled)} columns are there twice: {', '.join(doubled)}. Rename them."
            )
        layout = layout_of(schema.names, _LAYOUTS)
        if layout is None:
            raise UserError(
                f"{self.shards[shard]}: columns {', '.join(schema.names)}; expected"
                f" {named_layouts(_LAYOUTS)}. Rename the columns, or convert the file."
            )
        for name, kind in zip(layout, _LAYOUTS[layout], strict=True):
            if _kind(schema.field(name).type) != kind:
                raise UserError(
                    f"{self.shards[shard]}: column {name!r} has type {schema.field(name).type}; expected {kind}"
                )
        return schema.names

    def layout(self, shard: int) -> tuple[str, ...]:
        """Columns of the layout of a shard, images first; raises as `names` does."""
        found = layout_of(self.names(shard), _LAYOUTS)
        assert found is not None
        return found

    def _schema(self, shard: int) -> "pa.Schema":
        return self._metadata(shard).schema.to_arrow_schema()

    def _read_metadata(self, shard: int) -> "pq.FileMetaData":
        with _named(self.shards[shard]) as parquet:
            return parquet.read_metadata(self.shards[shard])

    def _read_column(self, shard: int, group: int, column: int) -> "pa.ChunkedArray":
        name = self._schema(shard).names[column]
        # Opened anew for every column, so that threads do not share a file position; the parsed metadata is reused.
        with (
            _named(self.shards[shard]) as parquet,
            parquet.ParquetFile(self.shards[shard], metadata=self._metadata(shard)) as file,
        ):
            return _plain(file.read_row_group(group, columns=[name]).column(0))


def rows(
    reader: ParquetReader, shard: int, unused: Counter[str] | None = None
) -> Iterator[tuple[str, Callable[[], list[Declared]]]]:
    """Iterate over the rows of a shard.

    Args:
        reader: reader of the source.
        shard: number of the shard.
        unused: is updated with the number of rows for each column that the layout does not use.

    Returns:
        Iterator of (key, function that parses the row), in order.

    Raises:
        UserError: the shard cannot be read, or its layout is unknown.
    """
    names = reader.names(shard)
    layout = reader.layout(shard)
    *pictures, text = [names.index(name) for name in layout]
    others = left_over(names, layout)
    for group in range(reader.row_groups(shard)):
        # A scan never returns to an earlier row group, so its columns would only take memory.
        reader.forget()
        # Held here for all rows of the group: a large column of images may push it out of the cache.
        texts = reader.column(shard, group, text)
        if unused is not None:
            unused.update(dict.fromkeys(others, len(texts)))
        for row in range(len(texts)):
            cells = {names[column]: Cell(shard, group, row, column, -1, 0) for column in pictures}
            place = Cell(shard, group, row, text, -1, 0)
            yield f"group {group} row {row}", partial(_declare, reader, cells, names[text], texts, place)


def _declare(
    reader: ParquetReader, pictures: Mapping[str, Cell], name: str, texts: "pa.ChunkedArray", place: Cell
) -> list[Declared]:
    """Items of a row.

    Args:
        reader: reader of the source.
        pictures: cells of the images, by column.
        name: name of the text column.
        texts: the text column of the row group.
        place: cell of the text.
    """
    record = {column: _cells(reader, cell) for column, cell in pictures.items()}
    try:
        text = texts[place.row].as_py()
    except UnicodeDecodeError as error:
        raise SampleError("text is not UTF-8", f"{name}: byte {error.start}") from error
    return declare(record | {name: text}, _same, place)


def texts_of(reader: ParquetReader, cell: Cell) -> dict[str, Any]:
    """A record with the texts of one row, and None in place of its images: enough to extract a passage."""
    value = reader.value(cell)
    *pictures, name = reader.layout(cell.shard)
    # A chain of edits is refused unless it has one more image than steps.
    images = [None] * (len(value) + 1) if name == "instruction_list" else None
    return {name: value} | dict.fromkeys(pictures, images)


def _cells(reader: ParquetReader, cell: Cell) -> Any:
    """Location of the image, or list of locations of the images, in a cell; None for a missing image."""
    scalar = reader.column(cell.shard, cell.group, cell.column)[cell.row]
    if not scalar.is_valid:
        return None
    if not hasattr(scalar, "values"):
        return replace(cell, size=len(scalar.as_buffer()))
    return [
        replace(cell, element=element, size=len(image.as_buffer())) if image.is_valid else None
        for element, image in enumerate(scalar)
    ]


def _same(where: str, cell: Any) -> Cell:
    if not isinstance(cell, Cell):
        raise invalid(where, "the bytes of an image", cell)
    return cell


def _kind(kind: "pa.DataType") -> str:
    """Name of an Arrow type after `_plain`, without large/view variants and element names, for comparison."""
    text = str(kind).replace("large_", "").replace("string_view", "string").replace("binary_view", "binary")
    text = re.sub(r"<(?:item|element|array): ", "<", text)
    text = re.sub(r"dictionary<values=(\w+), [^>]*>", r"\1", text)
    return re.sub(r"struct<(?:bytes: binary, path: string|path: string, bytes: binary)>", "binary", text)


def _plain(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Normalize a column: dictionary-encoded values become plain, views become large types, and images in the form of
    Hugging Face `datasets` (struct of bytes and path) become their bytes."""
    # Imported on use, so that runs without parquet shards start without it.
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        return column.cast(kind.value_type)
    if str(kind).endswith("_view"):
        return column.cast(pa.large_string() if "string" in str(kind) else pa.large_binary())
    if pa.types.is_struct(kind):
        return pc.struct_field(column, "bytes")
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        bytes_of = [value and [image and image["bytes"] for image in value] for value in column.to_pylist()]
        return pa.chunked_array([pa.array(bytes_of, pa.large_list(pa.large_binary()))])
    return column


@contextmanager
def _named(shard: Path) -> Iterator[Any]:
    """Context manager that gives pyarrow's parquet module and turns its errors into a UserError naming the shard."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{shard}: reading parquet needs pyarrow ({error}): pip install 'pyarrow>=16'") from error
    try:
        yield pyarrow.parquet
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{shard}: cannot be read as parquet ({error}). Bring the file back, or remove it from data.sources."
        ) from error


_CHANGED = "The shard changed while it was in use; start again, so that it is indexed anew."
