"""Columnar storage of documents, in memory and in cache files: 37 bytes per item, 8 bytes per document.

Four flat NumPy arrays hold the documents, their items, and the bytes of all keys and of all short texts, each back to
back. Python objects (`documents.Document`) are made on access: a million documents as JSON and Python objects take 3.0
times the memory and 8.2 times the time to load (benchmarks/index_load.py, docs/data.md).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megabagel.data.documents import Cell, Document, ImageItem, Item, Loose, Member, Passage, Place, Role, TextItem

DOCUMENT = np.dtype([("items", "<i4"), ("key_bytes", "<i4")])
"""Record of a document: number of its items, and length of its key in bytes."""

ITEM = np.dtype(
    [
        ("kind", "<u1"),  # type, role and flags, see below
        ("high", "<i4"),  # token ids of a text, height of an image
        ("wide", "<i4"),  # width of an image
        ("crc", "<u4"),  # CRC-32 of the bytes of an image, or of a text in UTF-8
        ("file", "<i4"),  # number of the shard (0 in a table of one shard), or _INLINE or _LOOSE
        ("at", "<i8"),  # byte in the shard or in texts; of a cell: row group and row
        ("size", "<i8"),  # bytes there
        (
            "part",
            "<i4",
        ),  # of a cell: column; then 1 + element of the cell or number of the passage; of a path: 1 + length
    ]
)
"""Record of an item: kind, sizes, checksum and location. Little-endian and packed, because it is the format on disk."""

TYPES = {"documents": DOCUMENT, "items": ITEM, "keys": np.dtype("<u1"), "texts": np.dtype("<u1")}
"""Element types of the arrays of a `Table`."""

# Layout of the byte `kind`: bit 0 image, bits 1-2 and 7 index into _ROLES, bit 3 alternative wording or further frame,
# bits 4-5 steps of a joined instruction, bit 6 location in a parquet cell.
_ROLES: tuple[Role | None, ...] = (None, "condition", "target", "look", "reward", "constraint")
IMAGE = 1
"""Bit of `kind` that distinguishes images from texts."""
_FURTHER, _CELL, _HIGH_ROLE = 8, 64, 128
_ROLE_SHIFT, _JOINED_SHIFT = 1, 4
MEANING = 255 - _CELL
"""Bits of `kind` that describe the item itself; the remaining bit (_CELL) belongs to its location."""

# Values of the field `file` for items outside of shards: a text held in the table, an image in a file of its own.
_INLINE, _LOOSE = -1, -2
_COLUMN_SHIFT, _GROUP_SHIFT = 20, 32

_NAMES = "surrogateescape"
"""Error handler for keys: they are file names, whose bytes need not be UTF-8."""

Row = tuple[int, int, int, int, int, int, int, int]
"""Fields of an item as Python integers, in the order of `ITEM`."""


@dataclass(frozen=True)
class Table:
    """Documents of one shard, or of several shards (see `joined`), as four arrays."""

    documents: np.ndarray
    items: np.ndarray
    keys: np.ndarray
    texts: np.ndarray
    """UTF-8 bytes of short texts, and of the paths of images in files of their own."""

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [documents + 1]: index of the first item of every document."""
        return _starts(self.documents["items"])

    @cached_property
    def key_at(self) -> np.ndarray:
        """int64 [documents + 1]: offset of the first byte of every key."""
        return _starts(self.documents["key_bytes"])

    def problem(self) -> str | None:
        """Check that the arrays are consistent; return what is wrong, or None.

        Lengths and offsets that were read from a file are not trusted: after this check, documents and items refer to
        bytes inside the arrays.
        """
        documents, items = self.documents, self.items
        if (documents["items"] < 1).any() or documents["items"].sum(dtype=np.int64) != len(items):
            return "documents do not have the items that are there"
        if (documents["key_bytes"] < 0).any() or documents["key_bytes"].sum(dtype=np.int64) != len(self.keys):
            return "documents do not have the keys that are there"
        inside_I = (items["file"] >= _LOOSE) & (items["file"] <= 0) & (items["at"] >= 0) & (items["size"] >= 0)
        length_I = np.where(items["file"] == _LOOSE, items["part"] - 1, items["size"])
        held_I = items["file"] < 0
        inside_I &= ~held_I | ((length_I >= 0) & (items["at"] + length_I <= len(self.texts)))
        if not (inside_I & (items["high"] >= 0) & (items["wide"] >= 0)).all():
            return "items lie outside of their shard"
        return None

    def chosen(self, numbers: np.ndarray) -> "Table":
        """A table of the documents `numbers` (int64, ascending) alone."""
        selected = np.zeros(len(self), bool)
        selected[numbers] = True
        items = self.items[np.repeat(selected, self.documents["items"])]
        keys = self.keys[np.repeat(selected, self.documents["key_bytes"])]
        # The texts are shared whole, so the offsets of the items stay valid.
        return Table(self.documents[selected], items, keys, self.texts)

    def document(self, number: int) -> Document:
        """One document, with the roles that the sample itself declares."""
        return Document(self.key(number), tuple(self.item(row, declared_role(row)) for row in self.rows(number)))

    def rows(self, number: int) -> list[Row]:
        """Records of the items of one document."""
        return self.items[self.first[number] : self.first[number + 1]].tolist()

    def key(self, number: int) -> str:
        """Key of one document."""
        return self.keys[self.key_at[number] : self.key_at[number + 1]].tobytes().decode(errors=_NAMES)

    def item(self, row: Row, role: Role | None) -> Item:
        """Build an item from its record, in the role `role`."""
        kind, high, wide, crc, file, at, size, part = row
        further = bool(kind & _FURTHER)
        number = (part & (1 << _COLUMN_SHIFT) - 1) - 1
        if kind & IMAGE:
            place: Place
            if kind & _CELL:
                place = _cell(file, at, size, part, number)
            else:
                place = Member(file, at, size) if file >= 0 else Loose(self._text(at, number), size)
            return ImageItem(high, wide, place, role, further, crc)  # type: ignore[arg-type]
        source: str | Member | Passage
        if file == _INLINE:
            source = self._text(at, size)
        elif kind & _CELL:
            source = Passage(_cell(file, at, size, part, -1), number)
        else:
            source = Member(file, at, size) if number < 0 else Passage(Member(file, at, size), number)
        return TextItem(high, source, role, further, kind >> _JOINED_SHIFT & 3, crc)  # type: ignore[arg-type]

    def _text(self, at: int, size: int) -> str:
        return self.texts[at : at + size].tobytes().decode()


def declared_role(row: Row) -> Role | None:
    """Role that the sample itself declares for an item, or None."""
    kind = row[0]
    return _ROLES[kind >> _ROLE_SHIFT & 3 | (4 if kind & _HIGH_ROLE else 0)]


def _role_bits(role: Role | None) -> int:
    number = _ROLES.index(role)
    return (number & 3) << _ROLE_SHIFT | (_HIGH_ROLE if number & 4 else 0)


def _cell(file: int, at: int, size: int, part: int, element: int) -> Cell:
    group, row = at >> _GROUP_SHIFT, at & (1 << _GROUP_SHIFT) - 1
    return Cell(file, group, row, part >> _COLUMN_SHIFT, element, size)


class TableBuilder:
    """Builds a `Table` from the documents of one shard, added in order."""

    def __init__(self) -> None:
        self._documents: list[tuple[int, int]] = []
        self._items: list[Row] = []
        self._keys, self._texts = bytearray(), bytearray()

    def add(self, key: str, items: Sequence[Item], checksums: Iterable[int]) -> None:
        """Append a document; `checksums` has the CRC-32 of the content of every item."""
        name = key.encode(errors=_NAMES)
        self._documents.append((len(items), len(name)))
        self._keys += name
        for item, checksum in zip(items, checksums, strict=True):
            role = _role_bits(item.role)
            if isinstance(item, TextItem):
                kind = role | item.alternative * _FURTHER | item.joined << _JOINED_SHIFT
                place, high, wide = self._text_place(item.source), item.n_ids, 0
            else:
                kind = role | IMAGE | item.frame * _FURTHER
                place, high, wide = self._image_place(item.member), item.height, item.width
            cell, where = place
            self._items.append((kind | cell, high, wide, checksum, *where))

    def table(self) -> Table:
        """The table of the documents added so far."""
        documents, items = np.array(self._documents, DOCUMENT), np.array(self._items, ITEM)
        return Table(documents, items, np.frombuffer(self._keys, np.uint8), np.frombuffer(self._texts, np.uint8))

    def _text_place(self, source: str | Member | Passage) -> "_Placed":
        match source:
            case str():
                at, size = self._keep(source)
                return 0, (_INLINE, at, size, 0)
            case Passage(place, part):
                return _placed(place, part)
            case Member():
                return _placed(source, -1)

    def _image_place(self, place: Place) -> "_Placed":
        match place:
            case Loose(path, size):
                at, length = self._keep(path)
                return 0, (_LOOSE, at, size, length + 1)
            case Cell(element=element):
                return _placed(place, element)
            case Member():
                return _placed(place, -1)

    def _keep(self, text: str) -> tuple[int, int]:
        """Append a string to the texts; return the offset and length of its bytes."""
        at, data = len(self._texts), text.encode()
        self._texts += data
        return at, len(data)


_Placed = tuple[int, tuple[int, int, int, int]]
"""The _CELL bit of `kind`, or 0; and the fields file, at, size and part."""


def _placed(place: Member | Cell, number: int) -> _Placed:
    if isinstance(place, Cell):
        at, part = place.group << _GROUP_SHIFT | place.row, place.column << _COLUMN_SHIFT | number + 1
        return _CELL, (0, at, place.size, part)
    return 0, (0, place.offset, place.size, number + 1)


def joined(tables: Sequence[Table]) -> Table:
    """Concatenate the tables of several shards. Items get the number of their shard and shifted text offsets."""
    parts = {name: [getattr(table, name) for table in tables] for name in TYPES}
    joint = Table(**{name: np.concatenate(arrays) for name, arrays in parts.items()})
    counts = [len(table.items) for table in tables]
    shard = np.repeat(np.arange(len(tables), dtype=np.int32), counts)
    text_start = np.repeat(_starts([len(table.texts) for table in tables])[:-1], counts)
    in_shard = joint.items["file"] == 0
    joint.items["file"][in_shard] = shard[in_shard]
    joint.items["at"][~in_shard] += text_start[~in_shard]
    return joint


def _starts(counts: np.ndarray | Sequence[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
