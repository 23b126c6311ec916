"""Reader of a checkpoint's tensors: any slice of any tensor, from any grid, in little memory and without ranks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megabagel.checkpoint.checksums import ANOTHER, SummedReader, check_files
from megabagel.checkpoint.index import Entry, Index, StoredSlice, from_json, header_entry, overlap, renamed, slice_name
from megabagel.checkpoint.lazy import LazyTensor, row_ranges
from megabagel.checkpoint.manifest import (
    INDEX,
    METADATA,
    STATE,
    Manifest,
    parse_json,
    read_json,
    read_manifest,
)
from megabagel.errors import UserError

# Files open at a time; each keeps a few blocks in memory.
_OPEN = 8
# Limit of the safetensors library.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Target:
    """Memory to fill with a slice of a stored tensor."""

    key: str
    offset: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True)
class _Copy:
    """Intersection of a stored slice and a target, in the coordinates of each."""

    entry: Entry
    key: str
    box: StoredSlice
    source: tuple[slice, ...]
    target: torch.Tensor


class _File:
    """One safetensors file of the checkpoint, whose header must agree with the index about every slice."""

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        path, sums = folder / name, manifest.files[name]
        self.name, self.reader = name, SummedReader(path, sums)
        length = int.from_bytes(self.reader.read(0, 8), "little") if sums.size >= 8 else sums.size
        if 8 + length > min(sums.size, _LONGEST_HEADER):
            raise UserError(f"{path}: no safetensors file: its header has {length:,} bytes. {ANOTHER}")
        self.begin, self.size = 8 + length, sums.size
        header = parse_json(path, self.reader.read(8, self.begin))
        self.header: dict[str, Any] = header if isinstance(header, dict) else {}

    def place(self, key: str, entry: Entry, box: StoredSlice) -> int:
        """Return the first byte of a slice in the file. Raises UserError if header and index disagree."""
        name = slice_name(key, box.offset)
        expected, found = header_entry(entry, box), self.header.get(name)
        if found != expected or self.begin + expected["data_offsets"][1] > self.size:
            raise UserError(
                f"{self.reader.path}: {name} is {found} in {self.size:,} bytes, by {INDEX} it is {expected}. {ANOTHER}"
            )
        return self.begin + box.start


class Stored:
    """Tensors of a checkpoint folder; every byte returned has passed its checksum.

    Raises UserError if the folder is not a complete checkpoint, and on reading if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        read_json(folder, METADATA, self.manifest)
        self.index: Index = from_json(folder / INDEX, read_json(folder, INDEX, self.manifest), self.manifest.files)
        self._stored_key = renamed(self.index)
        self._files: dict[str, _File] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self.index[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Stored type of a tensor."""
        return self.index[key].dtype

    def state(self) -> dict[str, Any]:
        """Return the JSON state of the run."""
        found = read_json(self.folder, STATE, self.manifest)
        if not isinstance(found, dict):
            raise UserError(f"{self.folder / STATE}: no JSON object, expected the state of a run. {ANOTHER}")
        return found

    def part(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        """Return a slice of a tensor, read in pieces when needed and cast.

        Args:
            key: `<kind>/<name>` of the tensor.
            offset: first index of the slice in each dimension of the whole tensor.
            shape: of the slice.
            dtype: of the result.
        """

        def pieces() -> Iterator[torch.Tensor]:
            for start, stop in row_ranges(shape, dtype):
                piece = torch.empty((stop - start, *shape[1:]), dtype=dtype)
                self.fill([Target(key, (offset[0] + start, *offset[1:]), piece)])
                yield piece

        return LazyTensor(shape, dtype, pieces)

    def whole(self, key: str, dtype: torch.dtype | None = None) -> LazyTensor:
        """Return a whole tensor, read in pieces when needed; in its stored type unless `dtype` is given."""
        shape = self.shape(key)
        return self.part(key, (0,) * len(shape), shape, dtype or self.dtype(key))

    def fill(self, targets: Iterable[Target]) -> None:
        """Fill targets of any type and device. Files are read in the order of their bytes."""
        copies = sorted(self._copies(targets), key=lambda copy: (copy.box.file, copy.box.start))
        for copy in copies:
            self._copy(copy)

    def _copies(self, targets: Iterable[Target]) -> Iterator[_Copy]:
        """Yield the intersections of targets with stored slices."""
        for target in targets:
            entry = self.index[target.key]
            for box in entry.boxes:
                shared = overlap(box.offset, box.shape, target.offset, tuple(target.tensor.shape))
                if shared:
                    source = tuple(slice(a - o, b - o) for (a, b), o in zip(shared, box.offset, strict=True))
                    there = tuple(slice(a - o, b - o) for (a, b), o in zip(shared, target.offset, strict=True))
                    yield _Copy(entry, self._stored_key.get(target.key, target.key), box, source, target.tensor[there])

    def _copy(self, copy: _Copy) -> None:
        """Read the rows a target needs: directly into contiguous memory of the same type, else in pieces."""
        file = self._opened(copy.box.file)
        first, *others = copy.source
        dtype, row = copy.entry.dtype, copy.box.shape[1:]
        row_bytes = prod(row) * dtype.itemsize
        begin = file.place(copy.key, copy.entry, copy.box) + first.start * row_bytes
        target = copy.target
        whole_rows = tuple(target.shape[1:]) == row
        if whole_rows and target.is_contiguous() and target.dtype == dtype and target.device.type == "cpu":
            file.reader.read_into(begin, _bytes(target))
            return
        for start, stop in row_ranges((first.stop - first.start, *row), dtype):
            piece = torch.empty((stop - start, *row), dtype=dtype)
            file.reader.read_into(begin + start * row_bytes, _bytes(piece))
            target[start:stop] = piece[(slice(None), *others)]

    def check_headers(self, rank: int, ranks: int) -> None:
        """Compare file headers with the index: share `rank` of `ranks` of the files."""
        boxes = [(key, entry, box) for key, entry in self.index.items() for box in entry.boxes]
        mine = set(sorted({box.file for _, _, box in boxes})[rank::ranks])
        for key, entry, box in sorted(boxes, key=lambda item: item[2].file):
            if box.file in mine:
                self._opened(box.file).place(self._stored_key.get(key, key), entry, box)
        self.close()

    def _opened(self, name: str) -> _File:
        """Return an open file. Least recently used ones are closed: a tensor lies in few files, one after the other."""
        file = self._files.pop(name, None) or _File(self.folder, name, self.manifest)
        self._files[name] = file
        if len(self._files) > _OPEN:
            self._files.pop(next(iter(self._files))).reader.close()
        return file

    def close(self) -> None:
        """Close all open files."""
        for file in self._files.values():
            file.reader.close()
        self._files.clear()


def verify(folder: Path, rank: int = 0, ranks: int = 1) -> Manifest:
    """Read a whole checkpoint, or share `rank` of `ranks` of its bytes, and compare its checksums.

    Raises:
        UserError: for the first damage found.
    """
    stored = Stored(folder)
    stored.state()
    stored.check_headers(rank, ranks)
    check_files({folder / name: sums for name, sums in stored.manifest.files.items()}, rank, ranks)
    return stored.manifest


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
