"""Lazy tensors: read when needed and written piece by piece, so that tensors of any size take little memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megabagel.checkpoint.checksums import SummedWriter, Sums
from megabagel.checkpoint.index import Entry, Index, StoredSlice, header_entry, merged, slice_name, to_json
from megabagel.checkpoint.manifest import BACKEND, FORMAT, INDEX, METADATA, replace_file

PIECE_BYTES = 64 << 20
"""Most bytes of a tensor held at once, unless one row has more."""


@dataclass(frozen=True)
class LazyTensor:
    """Tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterable[torch.Tensor]]
    """Consecutive rows of dimension 0, in pieces."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def row_ranges(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) ranges of rows of at most PIECE_BYTES that tile a tensor."""
    step = max(1, PIECE_BYTES // (prod(shape[1:]) * dtype.itemsize))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class Part:
    """Slice of a whole tensor, to be written."""

    key: str
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    data: LazyTensor


def file_of(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def write_file(path: Path, parts: Sequence[Part]) -> tuple[Index, Sums]:
    """Write slices as one safetensors file, named by `index.slice_name`, and flush it. Raises OSError."""
    parts = sorted(parts, key=lambda part: -part.data.dtype.itemsize)  # the widest first, so that all are aligned
    index, header, at = {}, {}, 0
    boxes: dict[str, list[StoredSlice]] = {}
    for part in parts:
        box = StoredSlice(path.name, part.offset, part.data.shape, at)
        boxes.setdefault(part.key, []).append(box)
        entry = index[part.key] = Entry(part.data.dtype, part.whole, tuple(boxes[part.key]))
        header[slice_name(part.key, part.offset)] = header_entry(entry, box)
        at += part.data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer = SummedWriter(path)
    try:
        writer.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            _lay_down(writer, part.data)
        return index, writer.finish()
    finally:
        writer.close()


def _lay_down(writer: SummedWriter, tensor: LazyTensor) -> None:
    """Write one tensor. A function of its own, so that its last piece is freed before the next tensor is read."""
    size = 0
    for piece in tensor.read():
        size += piece.nbytes
        writer.write(piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    assert size == tensor.nbytes, (size, tensor)


def write_index(folder: Path, parts: Iterable[Index]) -> None:
    """Write the index of all ranks' files, and the name of the format for megatron-core. Raises OSError."""
    replace_file(folder / INDEX, to_json(merged(parts)))
    names = ("sharded_backend", "common_backend")
    content = {key: value for name in names for key, value in ((name, BACKEND), (f"{name}_version", FORMAT))}
    replace_file(folder / METADATA, json.dumps(content))


def write(folder: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, Sums]:
    """Write whole tensors, keyed `weight/<name>`, into one file of a folder; returns its checksums. Raises OSError."""
    parts = [Part(key, tensor.shape, (0,) * len(tensor.shape), tensor) for key, tensor in tensors.items()]
    index, sums = write_file(folder / file_of(0), parts)
    write_index(folder, [index])
    return {file_of(0): sums}
