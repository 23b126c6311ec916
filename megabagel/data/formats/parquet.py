"""Parquet files in the released layouts, and random access to their cells (docs/bagel.md#data-layouts).

A cell cannot be read alone: its column is read for the whole row group. Columns are kept, up to a bound, so groups
should be small (tens of MB) where samples are drawn in random order.
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
"""Most bytes of columns that a reader holds; the column in use is held whatever its size."""

_LAYOUTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("image", "captions"): ("binary", "string"),
    ("image_list", "instruction_list"): ("list<binary>", "list<list<string>>"),
    ("text",): ("string",),
    **{pair: ("binary", "string") for pair in PAIRS if pair[0] == "image"},
}
"""Columns of a layout, images first and texts last, and their types."""


class ParquetReader:
    """Cells of a list of shards. Threads may share a reader."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = tuple(shards)
        self._metadata = lru_cache(maxsize=OPEN_SHARDS)(self._read_metadata)
        self._columns: OrderedDict[tuple[int, int, int], pa.ChunkedArray] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def value(self, cell: Cell) -> Any:
        """What stands in the cell, or in one element of its list, as a Python value.

        Raises:
            UserError: the shard is gone or changed.
        """
        column = self.column(cell.shard, cell.group, cell.column)
        if cell.row >= len(column):
            raise UserError(f"{self.shards[cell.shard]}: no row {cell.row} in row group {cell.group}. {_CHANGED}")
        scalar = column[cell.row]
        return scalar.as_py() if cell.element < 0 else scalar[cell.element].as_py()

    def read(self, cell: Cell) -> bytes:
        """The bytes of an image; raises as `value` does."""
        data = self.value(cell)
        if len(data) != cell.size:
            where = f"row group {cell.group}, row {cell.row}"
            raise UserError(f"{self.shards[cell.shard]}: {where}: {len(data)} bytes, not {cell.size}. {_CHANGED}")
        return data

    def column(self, shard: int, group: int, column: int) -> "pa.ChunkedArray":
        """One column of one row group."""
        place = shard, group, column
        with self._lock:
            if place in self._columns:
                self._columns.move_to_end(place)
                return self._columns[place]
        values = self._read_column(shard, group, column)
        with self._lock:
            if place not in self._columns:
                self._columns[place] = values
                self._held += values.nbytes
            while self._held > HELD_BYTES and len(self._columns) > 1:
                self._held -= self._columns.popitem(last=False)[1].nbytes
        return values

    def forget(self) -> None:
        """Let go of all columns."""
        with self._lock:
            self._columns.clear()
            self._held = 0

    def row_groups(self, shard: int) -> int:
        """Row groups of a shard."""
        return self._metadata(shard).num_row_groups

    def names(self, shard: int) -> list[str]:
        """Names of the columns of a shard.

        Raises:
            UserError: the layout is none of those that are understood.
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
        """The columns that are read, images first; raises as `names` does."""
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
        # A file of its own, so that threads do not share a position.
        with (
            _named(self.shards[shard]) as parquet,
            parquet.ParquetFile(self.shards[shard], metadata=self._metadata(shard)) as file,
        ):
            return _plain(file.read_row_group(group, columns=[name]).column(0))


def rows(
    reader: ParquetReader, shard: int, unused: Counter[str] | None = None
) -> Iterator[tuple[str, Callable[[], list[Declared]]]]:
    """(key, its items when called) for every row of a shard, in order; `unused` counts the cells of other columns.

    Raises:
        UserError: the shard cannot be read, or its layout is unknown.
    """
    names = reader.names(shard)
    layout = reader.layout(shard)
    *pictures, text = [names.index(name) for name in layout]
    others = left_over(names, layout)
    for group in range(reader.row_groups(shard)):
        reader.forget()  # the group before: nobody comes back to it
        texts = reader.column(shard, group, text)  # held here: a large column of images may take its place there
        if unused is not None:
            unused.update(dict.fromkeys(others, len(texts)))
        for row in range(len(texts)):
            cells = {names[column]: Cell(shard, group, row, column, -1, 0) for column in pictures}
            place = Cell(shard, group, row, text, -1, 0)
            yield f"group {group} row {row}", partial(_declare, reader, cells, names[text], texts, place)


def _declare(
    reader: ParquetReader, pictures: Mapping[str, Cell], name: str, texts: "pa.ChunkedArray", place: Cell
) -> list[Declared]:
    """The items of a row: the cells of its images by column, and its text at `place` in the column `name`."""
    record = {column: _cells(reader, cell) for column, cell in pictures.items()}
    try:
        text = texts[place.row].as_py()
    except UnicodeDecodeError as error:
        raise SampleError("text is not UTF-8", f"{name}: byte {error.start}") from error
    return declare(record | {name: text}, _same, place)


def texts_of(reader: ParquetReader, cell: Cell) -> dict[str, Any]:
    """A record of the texts of one row; its images are left open."""
    value = reader.value(cell)
    *pictures, name = reader.layout(cell.shard)
    images = [None] * (len(value) + 1) if name == "instruction_list" else None
    return {name: value} | dict.fromkeys(pictures, images)


def _cells(reader: ParquetReader, cell: Cell) -> Any:
    """Where the image or the images of a row lie, None for one that is missing."""
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
    """A type without its size and the names of its elements, as `_plain` makes it."""
    text = str(kind).replace("large_", "").replace("string_view", "string").replace("binary_view", "binary")
    text = re.sub(r"<(?:item|element|array): ", "<", text)
    text = re.sub(r"dictionary<values=(\w+), [^>]*>", r"\1", text)
    return re.sub(r"struct<(?:bytes: binary, path: string|path: string, bytes: binary)>", "binary", text)


def _plain(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """A column of texts or bytes: categories as their values, images of `datasets` (bytes and path) as their bytes."""
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
    """pyarrow's parquet module; what it raises becomes a UserError that names the shard."""
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
