"""Strategies of megatron-core's dist_checkpointing that save and load ShardedTensors in this package's format.

Loading goes through `dist_checkpointing.load`. Saving calls the strategy directly: `dist_checkpointing.save` always
writes a pickle of the common state, of which there is none. Saves are AsyncRequests, megatron-core's split into a
function to run beside training and functions that all ranks run afterwards (saver.py runs them).
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    AsyncSaveShardedStrategy,
    LoadCommonStrategy,
    LoadShardedStrategy,
)

from megabagel.checkpoint.checksums import ANOTHER, Sums
from megabagel.checkpoint.index import Index, from_plain, plain
from megabagel.checkpoint.lazy import LazyTensor, Part, file_of, write_file, write_index
from megabagel.checkpoint.manifest import BACKEND, FORMAT
from megabagel.checkpoint.reader import Stored, Target
from megabagel.errors import UserError
from megabagel.runtime.device import current_device
from megabagel.runtime.objects import gathered
from megabagel.runtime.phase import all_reduced

logger = logging.getLogger(__name__)


class HostCopies:
    """Reused host buffer for the slices that a rank writes."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, parts: list[Part]) -> list[Part]:
        """Copy slices into the buffer; the copies are valid until the next call."""
        size = sum(part.data.nbytes for part in parts)
        if size > len(self.buffer):
            self._pin(False)
            self.buffer = torch.empty(0, dtype=torch.uint8)  # gives back the old one first
            self.buffer = torch.empty(size, dtype=torch.uint8)
            self._pin(True)
        copied, at = [], 0
        for part in sorted(parts, key=lambda part: -part.data.dtype.itemsize):
            there = self.buffer[at : at + part.data.nbytes].view(part.data.dtype).view(part.data.shape)
            (source,) = part.data.read()
            there.copy_(source, non_blocking=True)
            copied.append(Part(part.key, part.whole, part.offset, _held(there)))
            at += part.data.nbytes
        torch.cuda.synchronize()
        return copied

    def _pin(self, pinned: bool) -> None:
        """Pin or unpin the buffer for fast copies from a GPU.

        Not torch's pinned memory, which is allocated in powers of two.
        """
        if not torch.cuda.is_available() or not len(self.buffer):
            return
        runtime, at = torch.cuda.cudart(), self.buffer.data_ptr()
        code = runtime.cudaHostRegister(at, len(self.buffer), 0) if pinned else runtime.cudaHostUnregister(at)
        if int(code):  # copies are right without, and slower
            logger.warning("host memory of checkpoints could not be pinned: CUDA error %d", int(code))


class SaveSlices(AsyncSaveShardedStrategy):
    """Writes the slices that this rank holds as main replica into its own file; rank 0 also writes the index.

    Args:
        copies: buffer that slices are copied to before the request is returned. Without it, they must not change until
            the request is done.
    """

    def __init__(self, copies: HostCopies | None = None) -> None:
        super().__init__(BACKEND, FORMAT)
        self.copies = copies
        self.sums: dict[str, Sums] = {}
        """Checksums of the files of all ranks, on rank 0, once the request is finalized."""

    def async_save(self, sharded_state_dict: Mapping[str, ShardedTensor], checkpoint_dir: str | Path) -> AsyncRequest:
        """The function to call beside training, and the one to call on all ranks when it is done on all.

        Both raise OSError when the disk refuses.
        """
        folder, rank = Path(checkpoint_dir), dist.get_rank()
        parts = [_part(tensor) for tensor in sharded_state_dict.values() if is_main_replica(tensor.replica_id)]
        if self.copies is not None:
            parts = self.copies.take(parts)
        written: list[tuple[str, Index, Sums]] = []

        def write() -> None:
            if parts:
                written.append((file_of(rank), *write_file(folder / file_of(rank), parts)))

        return AsyncRequest(write, (), [partial(self._finish, folder, written)])

    def _finish(self, folder: Path, written: list[tuple[str, Index, Sums]]) -> None:
        everyone = gathered([[name, plain(index), sums.size, sums.blocks] for name, index, sums in written])
        if dist.get_rank() == 0:
            files = [file for rank in everyone for file in rank]
            self.sums = {name: Sums(size, tuple(blocks)) for name, _, size, blocks in files}
            write_index(folder, [from_plain(index) for _, index, _, _ in files])


class LoadBoxes(LoadShardedStrategy):
    """Fills ShardedTensors in place from the slices of any grid."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def load(self, sharded_state_dict: Mapping[str, ShardedTensor], checkpoint_dir: str | Path) -> dict[str, Any]:
        """Fill this rank's tensors. Raises UserError for one that the checkpoint lacks or has in another shape."""
        for tensor in sharded_state_dict.values():
            if tensor.key not in self.stored or self.stored.shape(tensor.key) != tuple(tensor.global_shape):
                found = f"is {list(self.stored.shape(tensor.key))}" if tensor.key in self.stored else "is missing"
                raise UserError(
                    f"{self.stored.folder}: tensor {tensor.key} {found}, expected {list(tensor.global_shape)}. "
                    + ANOTHER
                )
        self.stored.fill(
            Target(tensor.key, tuple(tensor.global_offset), tensor.data.detach())
            for tensor in sharded_state_dict.values()
        )
        return {label: tensor.data for label, tensor in sharded_state_dict.items()}

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedTensor]:
        """Key, type and shape of every tensor of the checkpoint."""
        return {
            key: ShardedTensor.from_rank_offsets(key, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
            for key, entry in self.stored.index.items()
        }

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """`metadata.json` was checked when `stored` was opened."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Likewise."""


class NothingCommon(LoadCommonStrategy):
    """Strategy for the common state (not sharded): there is none."""

    can_handle_sharded_objects = True

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """An empty state."""
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: str | Path) -> dict[str, Any]:
        """No objects."""
        return {}

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """Any."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Any."""


def _part(tensor: ShardedTensor) -> Part:
    data = tensor.data.detach()
    return Part(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), _held(data))


def _held(data: torch.Tensor) -> LazyTensor:
    """A tensor in memory."""
    return LazyTensor(tuple(data.shape), data.dtype, lambda: (data,))


def bytes_of(tensors: Mapping[str, ShardedTensor]) -> tuple[int, int]:
    """Return (bytes, slices) that all ranks together write. Collective."""
    mine = [tensor.data.nbytes for tensor in tensors.values() if is_main_replica(tensor.replica_id)]
    total = torch.tensor([sum(mine), len(mine)], device=current_device())
    dist.all_reduce(total)
    size, count = all_reduced(total).tolist()
    return size, count
