"""Index of a checkpoint: which slice of which tensor lies in which file, as JSON.

    {"weight/heads.lm_head.weight": {"dtype": "F32", "shape": [264, 32], "boxes": [
        ["rank_00000.safetensors", [0, 0], [132, 32], 0], ["rank_00001.safetensors", [132, 0], [132, 32], 0]]}}

A box of the format is an n-d slice: (file, offset in the tensor, shape, first byte after the file's header). The slices
of a tensor tile it: each element is in exactly one. Every file is an ordinary safetensors file whose header repeats
this for its own slices.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from megabagel.checkpoint.checksums import ANOTHER, Sums
from megabagel.config.typed_json import Count, Positive, WrongValue, read_as
from megabagel.errors import UserError, printable

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights may have, by their safetensors name."""
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class StoredSlice:
    """Slice of a tensor in a file."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the file's header."""


@dataclass(frozen=True)
class Entry:
    """Tensor of the whole model."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[StoredSlice, ...]

    def nbytes(self, box: StoredSlice) -> int:
        """Bytes of a slice."""
        return prod(box.shape) * self.dtype.itemsize


Index = dict[str, Entry]
"""Entries by key, `<kind>/<name>`."""


def slice_name(key: str, offset: tuple[int, ...]) -> str:
    """Name of a slice in its file, such as `weight/heads.lm_head.weight@132,0`."""
    return f"{key}@{','.join(map(str, offset))}"


def header_entry(entry: Entry, box: StoredSlice) -> dict[str, Any]:
    """Return the entry of a slice in its file's safetensors header."""
    place = [box.start, box.start + entry.nbytes(box)]
    return {"dtype": NAMES[entry.dtype], "shape": list(box.shape), "data_offsets": place}


def merged(parts: Iterable[Index]) -> Index:
    """Merge the indices of single ranks."""
    whole: dict[str, Entry] = {}
    for key, entry in (item for part in parts for item in part.items()):
        boxes = whole[key].boxes if key in whole else ()
        whole[key] = Entry(entry.dtype, entry.shape, boxes + entry.boxes)
    for key, entry in whole.items():
        assert (problem := untiled(entry)) is None, (key, problem)
    return whole


def plain(index: Index) -> dict[str, Any]:
    """Convert an index to JSON values, sorted by key."""
    return {
        key: {
            "dtype": NAMES[entry.dtype],
            "shape": entry.shape,
            "boxes": [[box.file, box.offset, box.shape, box.start] for box in entry.boxes],
        }
        for key, entry in sorted(index.items())
    }


def from_plain(content: Mapping[str, Any]) -> Index:
    """Convert back from `plain`. Not validated as files are: another rank of this job wrote it."""
    return {key: _entry(about) for key, about in content.items()}


def _entry(about: Any) -> Entry:
    boxes = tuple(StoredSlice(file, tuple(at), tuple(shape), start) for file, at, shape, start in about["boxes"])
    return Entry(TYPES[about["dtype"]], tuple(about["shape"]), boxes)


def to_json(index: Index) -> str:
    """Encode an index as JSON with one line per tensor."""
    lines = [f"{json.dumps(key)}: {json.dumps(about)}" for key, about in plain(index).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(path: Path, content: Any, files: Mapping[str, Sums]) -> Index:
    """Return the index of parsed JSON.

    Raises UserError unless it is consistent with itself and with the listed files.
    """
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: no index of tensors, expected a JSON object with some. {ANOTHER}")
    index = {}
    for key, about in content.items():
        try:
            written = read_as(_Written, about)
            if not _KEY.fullmatch(key):
                raise WrongValue("its name is none of a tensor")
        except WrongValue as error:
            raise UserError(
                f"{path}: its entry of {printable(key)[:200]} cannot be understood ({error}). {ANOTHER}"
            ) from error
        boxes = tuple(StoredSlice(*box) for box in written.boxes)
        entry = index[key] = Entry(TYPES[written.dtype], written.shape, boxes)
        problem = next((p for box in boxes if (p := _misplaced(entry, box, files))), None) or untiled(entry)
        if problem:
            raise UserError(f"{path}: tensor {key} {list(entry.shape)}: {problem}. {ANOTHER}")
    return index


_KEY = re.compile(r"(?:weight|exp_avg|exp_avg_sq|ema)/[\w.]+")


@dataclass(frozen=True)
class _Written:
    """Schema of an entry in the file."""

    dtype: Literal["F64", "F32", "F16", "BF16"]
    shape: tuple[Positive, ...]
    boxes: tuple[tuple[str, tuple[Count, ...], tuple[Positive, ...], Count], ...]


def _misplaced(entry: Entry, box: StoredSlice, files: Mapping[str, Sums]) -> str | None:
    """Return what is wrong with a single slice, or None."""
    if box.file not in files:
        return f"a box lies in {box.file!r}, which the manifest does not list"
    if box.start + entry.nbytes(box) > files[box.file].size:
        return f"a box lies at bytes {box.start!r} and following of {box.file}, which has {files[box.file].size:,}"
    if not len(box.offset) == len(box.shape) == len(entry.shape):
        return f"a box at {list(box.offset)} has shape {list(box.shape)}"
    if any(at + size > end for at, size, end in zip(box.offset, box.shape, entry.shape, strict=True)):
        return f"the box at {list(box.offset)} of shape {list(box.shape)} lies outside"
    return None


def untiled(entry: Entry) -> str | None:
    """Return why the slices of a tensor do not tile it, or None. Each is known to lie inside.

    Slices tile the whole exactly if their signed corners (+1 or -1 by the number of upper sides) cancel except for
    those of the whole: a sum of indicator functions is determined by its mixed differences. Comparing all pairs took
    minutes for an index of 20,000 slices; this is linear in their number.
    """
    if not entry.shape or len(entry.shape) > MAX_DIMENSIONS:
        return f"{len(entry.shape)} dimensions; expected 1 to {MAX_DIMENSIONS}"
    corners: Counter[tuple[int, ...]] = Counter()
    for box in entry.boxes:
        _add_corners(corners, box.offset, box.shape, 1)
    _add_corners(corners, (0,) * len(entry.shape), entry.shape, -1)
    if not any(corners.values()):
        return None
    for box, other in combinations(sorted(entry.boxes, key=lambda box: box.offset)[:_COMPARED], 2):
        if overlap(other.offset, other.shape, box.offset, box.shape):
            return f"the boxes at {list(box.offset)} and {list(other.offset)} overlap"
    held, whole = sum(prod(box.shape) for box in entry.boxes), prod(entry.shape)
    return f"its boxes hold {held:,} numbers of {whole:,}" if held != whole else "its boxes overlap"


MAX_DIMENSIONS = 8
"""Most dimensions of a tensor: a slice has 2 ** dimensions corners."""
_COMPARED = 500
"""Number of slices among which the message looks for an overlapping pair."""


def _add_corners(corners: Counter[tuple[int, ...]], offset: tuple[int, ...], shape: tuple[int, ...], sign: int) -> None:
    """Count the corners of a slice with their signs."""
    sides = [((at, 1), (at + size, -1)) for at, size in zip(offset, shape, strict=True)]
    for corner in product(*sides):
        corners[tuple(at for at, _ in corner)] += sign * prod(parity for _, parity in corner)


RENAMED = {"embed.words.weight": "embed.tokens.weight"}
"""Current names of tensors that earlier versions of the model named differently."""


def renamed(index: Index) -> dict[str, str]:
    """Rename the tensors of `index` in place; returns the stored key of each renamed one, by its current key."""
    stored = {}
    for key in list(index):
        kind, _, name = key.partition("/")
        if name in RENAMED:
            now = f"{kind}/{RENAMED[name]}"
            index[now] = index.pop(key)
            stored[now] = key
    return stored


Range = tuple[int, int]


def overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], other: tuple[int, ...], extent: tuple[int, ...]
) -> list[Range] | None:
    """Return the intersection of two slices as [start, stop) per dimension, or None.

    Args:
        offset: of the first slice, per dimension.
        shape: of the first slice.
        other: offset of the second slice.
        extent: shape of the second slice.
    """
    ranges = [
        (max(at, to), min(at + size, to + length))
        for at, size, to, length in zip(offset, shape, other, extent, strict=True)
    ]
    return ranges if all(start < stop for start, stop in ranges) else None
