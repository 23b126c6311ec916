"""Checkpoints of any size in little memory and without ranks: written and read tensor by tensor, by one process.

The files are those of megatron-core's dist_checkpointing: torch.distributed.checkpoint's, and two small ones of its
own. `store.load` reads them on any grid. torch's writer keeps a piece of every tensor until the end, so the pieces are
laid down here.
"""

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile, ZipExtFile, ZipFile

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what the list of all pieces consists of
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.storage import WriteResult

from megabagel.errors import UserError

PIECE_BYTES = 64 << 20
"""Most bytes of a tensor held at once, unless one row has more."""
_ANOTHER = "Name another checkpoint."
DATA, COMMON = "__0_0.distcp", "common.pt"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterable[torch.Tensor]]
    """Consecutive rows of dimension 0, in pieces."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return prod(self.shape) * self.dtype.itemsize


def row_ranges(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most PIECE_BYTES that tile a tensor."""
    step = max(1, PIECE_BYTES // (prod(shape[1:]) * dtype.itemsize))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def write(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors under keys such as `weight/<name>` into a folder, as megatron-core's `save` would.

    Raises OSError when the disk refuses.
    """
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places = []
    with (folder / DATA).open("wb") as file:
        for key, tensor in tensors.items():
            chunks: list[ChunkStorageMetadata] = []
            row = 0
            for piece in tensor.read():
                offset, start = torch.Size((row, *[0] * (piece.dim() - 1))), file.tell()
                file.write(_packed(piece))
                index = MetadataIndex(key, offset, len(chunks))
                places.append(WriteResult(index, piece.nbytes, _StorageInfo(DATA, start, file.tell() - start)))
                chunks.append(ChunkStorageMetadata(offset, piece.shape))
                row += len(piece)
            assert row == tensor.shape[0], (key, row, tensor.shape)
            described[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
    FileSystemWriter(folder).finish(Metadata(described), [places])
    torch.save({}, folder / COMMON)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _packed(piece: torch.Tensor) -> memoryview:
    """A piece as torch.save lays it down. Through memory, because its own writing hides what the disk says."""
    buffer = io.BytesIO()
    exact = piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes
    torch.save(piece if exact else piece.clone(memory_format=torch.contiguous_format), buffer)
    return buffer.getbuffer()


class Stored:
    """The tensors of a checkpoint that any grid wrote, whole and one at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError when the list of tensors cannot be read."""
        self.folder = folder
        try:
            listed = FileSystemReader(folder).read_metadata()
            self._places: dict[MetadataIndex, _StorageInfo] = listed.storage_data
            self._tensors = {
                key: about
                for key, about in listed.state_dict_metadata.items()
                if isinstance(about, TensorStorageMetadata)
            }
        except (OSError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder}: its list of tensors cannot be read ({error}). {_ANOTHER}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Type in which a tensor is stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole tensor in `dtype`; beside it no more than a piece is in memory.

        Raises UserError when the checkpoint is damaged.
        """
        about = self._tensors[key]
        whole = torch.empty(about.size, dtype=dtype)
        for chunk in about.chunks:
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            try:
                self._fill(whole[box], self._places[MetadataIndex(key, chunk.offsets)], self.dtype(key))
            except (OSError, EOFError, LookupError, ValueError, BadZipFile) as error:
                raise UserError(f"{self.folder}: tensor {key} cannot be read ({error}). {_ANOTHER}") from error
        return whole

    def _fill(self, box: torch.Tensor, place: _StorageInfo, stored: torch.dtype) -> None:
        """Read one rank's box piece by piece; torch.load would hold all of it, which may be the largest tensor.

        What torch.save lays down is a zip archive with the numbers as they are in the record `data/0`.
        """
        part = _Part(self.folder / place.relative_path, place.offset, place.length)
        with part, ZipFile(part) as archive:
            (record,) = (name for name in archive.namelist() if name.endswith("/data/0"))
            with archive.open(record) as numbers:
                for start, stop in row_ranges(tuple(box.shape), stored):
                    piece = torch.empty((stop - start, *box.shape[1:]), dtype=stored)
                    if cast(ZipExtFile, numbers).readinto(piece.view(torch.uint8).numpy().data) != piece.nbytes:
                        raise EOFError(f"{record} of {place.relative_path} is too short")
                    box[start:stop] = piece


class _Part(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = path.open("rb"), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
