"""Sequence of the documents that a task can use, built from the table on access, and their fingerprint."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, overload

import numpy as np

from megabagel.data.documents import Document, Item, Role, SampleError, Task, TextItem, assign_roles
from megabagel.data.index.document_table import MEANING, Table


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Document]):
    """Documents `numbers` of a table, with the roles of a task. Behaves as a sequence of `Document`."""

    table: Table
    numbers: np.ndarray
    """int64, ascending."""
    task: Task
    tokenizer: str
    """Fingerprint of the tokenizer that counted the token ids."""
    # Roles and order depend only on the kinds of a document's items, so `assign_roles` runs once per combination of
    # kinds instead of once per document.
    _arrangements: dict[bytes, "Arrangement"] = field(default_factory=dict, repr=False)
    """Arrangement of the items under the task, by the kinds of a document's items."""

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Document: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Document, ...]: ...

    def __getitem__(self, place: int | slice) -> Document | tuple[Document, ...]:
        if isinstance(place, slice):
            return tuple(map(self._document, self.numbers[place].tolist()))
        return self._document(int(self.numbers[place]))

    def __iter__(self) -> Iterator[Document]:
        return map(self._document, self.numbers.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def fingerprint(self, count: int | None = None) -> str:
        """Fingerprint of the first `count` documents (default: all); independent of where their bytes are stored."""
        numbers = self.numbers[:count]
        tokenizer = hashlib.sha256(self.tokenizer.encode()).hexdigest()[:12]
        return str(Fingerprint(len(numbers), self.task, tokenizer, _digest(self.table, numbers)))

    def _document(self, number: int) -> Document:
        rows = self.table.rows(number)
        kind = bytes(row[0] & MEANING for row in rows)
        arrangement = self._arrangements.get(kind)
        if arrangement is None:
            arrangement = self._arrangements[kind] = _arrangement(self.task, self.table.document(number))
        return Document(
            self.table.key(number), tuple(self.table.item(rows[place], role) for place, role in arrangement)
        )


class Fingerprint(NamedTuple):
    """Parsed fingerprint: number of samples, task, digest of the tokenizer, digest of the contents."""

    samples: int
    task: str
    tokenizer: str
    contents: str

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Fingerprint | None":
        """Parse a fingerprint; None if the text has another format."""
        parts = text.split(":")
        if len(parts) != len(cls._fields) or not parts[0].isdecimal():
            return None
        return cls(int(parts[0]), *parts[1:])


def known_samples(documents: Documents, fingerprint: str) -> int | None:
    """Number of samples under an older fingerprint if these are still the first samples of the source, else None.

    A number means that at most samples were appended: the old ones keep their numbers, so a saved plan can continue.
    """
    old = Fingerprint.parse(fingerprint)
    if old is None or old.samples > len(documents) or documents.fingerprint(old.samples) != fingerprint:
        return None
    return old.samples


def what_changed(documents: Documents, fingerprint: str) -> str:
    """Description of how the documents differ from those of an older fingerprint, for messages."""
    old, now = Fingerprint.parse(fingerprint), Fingerprint.parse(documents.fingerprint())
    assert now is not None
    if old is None:
        return "indexed by another version of the program"
    if known_samples(documents, fingerprint) is not None:
        return f"{now.samples - old.samples} samples were appended to {old.samples}, which are the same"
    changes = [f"task {old.task!r}, now {now.task!r}"] if old.task != now.task else []
    if old.tokenizer != now.tokenizer:
        changes.append("another tokenizer")
    if old.samples != now.samples:
        changes.append(f"{old.samples} samples, now {now.samples}")
    return ", ".join(changes) or f"{now.samples} samples as before, but of other contents or order"


Arrangement = tuple[tuple[int, Role | None], ...]
"""Order and roles of the items under a task: (index of the item in the document as declared, role)."""


def usable(table: Table, task: Task) -> tuple[np.ndarray, list[tuple[int, SampleError]]]:
    """Split the documents of a table by whether they suit a task.

    Returns:
        int64 numbers of the documents that suit, and (number, error) of each one that does not.
    """
    kinds, first = (table.items["kind"] & MEANING).tobytes(), table.first.tolist()
    faults: dict[bytes, SampleError | None] = {}
    unusable = []
    for number in range(len(table)):
        kind = kinds[first[number] : first[number + 1]]
        if kind not in faults:
            faults[kind] = _fault(task, table.document(number))
        if fault := faults[kind]:
            unusable.append((number, fault))
    suits = np.ones(len(table), bool)
    suits[[number for number, _ in unusable]] = False
    return np.flatnonzero(suits), unusable


def _fault(task: Task, document: Document) -> SampleError | None:
    try:
        assign_roles(task, document)
    except SampleError as error:
        return error
    return None


def _arrangement(task: Task, document: Document) -> Arrangement:
    """Order and roles of the items of a document under a task."""

    # The index of an item is stored in its size field, which `assign_roles` leaves alone, and is read back afterwards:
    # `assign_roles` returns new items, among which equal ones could not be told apart otherwise.
    def marked(item: Item, place: int) -> Item:
        return replace(item, n_ids=place) if isinstance(item, TextItem) else replace(item, height=place)

    marks = tuple(marked(item, place) for place, item in enumerate(document.items))
    arranged = assign_roles(task, Document(document.key, marks))
    return tuple((item.n_ids if isinstance(item, TextItem) else item.height, item.role) for item in arranged.items)


def _digest(table: Table, numbers: np.ndarray) -> str:
    """Shortened SHA-256 of the contents of documents: kinds, sizes, checksums and keys, not their locations."""
    chosen = table.chosen(numbers)
    items = chosen.items
    digest = hashlib.sha256(chosen.documents.tobytes())
    for column in (items["kind"] & MEANING, items["high"], items["wide"], items["crc"]):
        digest.update(column.tobytes())
    digest.update(chosen.keys.tobytes())
    return digest.hexdigest()[:32]
