"""A read-only view of the tensors of one or several safetensors files, a few rows at a time.

The format: 8 bytes with the length of a JSON header, the header with type, shape and byte range of every tensor, then
the numbers of all tensors, row-major and little-endian. A sharded checkpoint has an index naming each tensor's file.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megabagel.checkpoint.hf.folder import MOST_JSON
from megabagel.checkpoint.index import TYPES
from megabagel.checkpoint.lazy import LazyTensor, row_ranges
from megabagel.config.reading import read_file
from megabagel.config.typed_json import Count, WrongValue, is_file_name, parse, read_as
from megabagel.errors import UserError, printable

INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the library's own limit
_AGAIN = "Copy or download the file again."


@dataclass(frozen=True)
class _Entry:
    path: Path
    type: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


class TensorFiles:
    """The tensors of a `.safetensors` file, or of all shards that a `.safetensors.index.json` names.

    keep: which names to look at; the others are as good as absent.
    Raises UserError for a file that is absent, truncated or no safetensors file, and for an index that does not fit its
    shards.
    """

    def __init__(self, path: Path, keep: Callable[[str], bool] = lambda name: True) -> None:
        self.path = path
        self._entries: dict[str, _Entry] = {}
        for shard in _shards(path) if path.name.endswith(INDEX_SUFFIX) else [path]:
            for name, entry in _entries(shard):
                if not keep(name):
                    continue
                if name in self._entries:
                    raise UserError(
                        f"{path}: tensor {name} lies in {self._entries[name].path.name} and again in {shard.name}, "
                        "expected once. Write the shards again."
                    )
                self._entries[name] = entry

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def type(self, name: str) -> str:
        """Type of a tensor by its name in the format, which need not be one of TYPES."""
        return self._entries[name].type

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; KeyError unless it is one of TYPES."""
        return TYPES[self._entries[name].type]

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entries[name].path

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor's dimension 0, read now."""
        entry = self._entries[name]
        numbers = torch.empty((stop - start, *entry.shape[1:]), dtype=self.dtype(name))
        # Read, not mapped: the pages of a mapped file count as this process's memory as long as it is mapped.
        try:
            with entry.path.open("rb") as file:
                file.seek(entry.start + start * prod(entry.shape[1:]) * numbers.itemsize)
                got = file.readinto(numbers.view(torch.uint8).numpy().data)
        except OSError as error:
            raise UserError(f"{entry.path}: cannot read tensor {name} ({error}). {_AGAIN}") from error
        if got != numbers.nbytes:
            raise UserError(f"{entry.path}: ends inside tensor {name}; it was whole a moment ago. {_AGAIN}")
        return numbers

    def lazy(self, name: str) -> LazyTensor:
        """A tensor, to be read in pieces."""
        shape, dtype = self.shape(name), self.dtype(name)
        return LazyTensor(shape, dtype, lambda: (self.rows(name, *rows) for rows in row_ranges(shape, dtype)))


@dataclass(frozen=True)
class _ShardIndex:
    weight_map: dict[str, str]


def _shards(index: Path) -> list[Path]:
    """Files that an index names, each checked to hold what the index says."""
    try:
        placed = read_as(_ShardIndex, parse(read_file(index, MOST_JSON))).weight_map
        places = sorted(set(placed.values()))
        for place in places:
            if not is_file_name(place):
                raise WrongValue(f"{place!a:.80} is no name of a file")
    except (OSError, WrongValue) as error:
        raise UserError(
            f"{index}: cannot be read as an index of shards ({error}); expected `weight_map` with a file for every "
            f"tensor. {_AGAIN}"
        ) from error
    held = {}
    for place in places:
        if not (index.parent / place).is_file():
            named = sorted(name for name in placed if placed[name] == place)
            raise UserError(
                f"{index}: names {place} for {len(named)} tensors, {named[0]} the first, but there is no such file "
                "beside it. Copy all shards."
            )
        held[place] = {name for name, _ in _entries(index.parent / place)}
    for name, place in placed.items():
        if name not in held[place]:
            raise UserError(f"{index}: places tensor {name} in {place}, which does not hold it. {_AGAIN}")
    return [index.parent / place for place in places]


@dataclass(frozen=True)
class _Written:
    """An entry of a header."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


def _entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    """(name, entry) of every tensor of a file. Together they fill it: no gap, no overlap, nothing behind the last one.

    What the safetensors library refuses is refused here, since the bytes are read without it.
    """
    header, begin, size = _header(path)
    written: dict[str, _Written] = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        try:
            written[name] = entry = read_as(_Written, about)
            if len(entry.shape) > _MOST_DIMENSIONS:
                raise WrongValue(f"it has {len(entry.shape)} dimensions")
        except WrongValue as error:
            raise UserError(f"{path}: no safetensors file: entry {name!a:.200}: {error}. {_AGAIN}") from error
        start, stop = entry.data_offsets
        length, expected = stop - start, prod(entry.shape) * _itemsize(entry.dtype)
        if length < 0 or (entry.dtype in TYPES and length != expected):
            raise UserError(
                f"{path}: tensor {printable(name)} of type {printable(entry.dtype)}, shape {list(entry.shape)}, takes "
                f"{length} bytes by the header, expected {expected}. {_AGAIN}"
            )
        if begin + stop > size:
            end = f"ends at byte {begin + stop:,}, the file at {size:,}"
            raise UserError(f"{path}: truncated: tensor {printable(name)} {end}. {_AGAIN}")
    _check_filled(path, written, size - begin)
    for name, entry in written.items():
        yield name, _Entry(path, entry.dtype, entry.shape, begin + entry.data_offsets[0])


_MOST_DIMENSIONS = 64


def _itemsize(kind: str) -> int:
    """Bytes of a number; 0 for a type that weights do not have, which is refused later, by name."""
    return TYPES[kind].itemsize if kind in TYPES else 0


def _check_filled(path: Path, written: Mapping[str, _Written], size: int) -> None:
    """Raise UserError unless each tensor begins where the one before ends, and the last one ends with the file."""
    at, before = 0, "the header"
    for name, entry in sorted(written.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != at:
            problem = "overlaps" if start < at else f"is {start - at:,} bytes behind"
            what = f"tensor {printable(name)} {problem} {printable(before)}"
            raise UserError(f"{path}: no safetensors file: {what}. {_AGAIN}")
        at, before = stop, f"tensor {name}"
    if at != size:
        raise UserError(f"{path}: no safetensors file: {size - at:,} bytes follow {printable(before)}. {_AGAIN}")


def _refuse_half_characters(text: bytes, header: dict[str, Any]) -> None:
    """Raise WrongValue for an escape of half a character, which Python's parser takes and the library refuses."""
    if b"\\u" in text:
        try:
            json.dumps(header, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise WrongValue("a text has half a character") from error


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, first byte after it, size of the file)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _LONGEST_HEADER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a safetensors file") from error
    if size < 8 or len(text) < length <= _LONGEST_HEADER:
        raise UserError(f"{path}: truncated: the file ends at byte {size:,}, inside the header. {_AGAIN}")
    try:
        header = read_as(dict[str, Any], parse(text) if length <= _LONGEST_HEADER else None)
        _refuse_half_characters(text, header)
    except WrongValue as error:
        raise UserError(
            f"{path}: no safetensors file: it does not start with a JSON header ({str(error)[:100]}). {_AGAIN}"
        ) from error
    return header, 8 + length, size
