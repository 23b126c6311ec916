"""Objects that hold large arrays, handed from one process to another over a Unix socket.

Arrays and tensors travel in anonymous shared memory, which the receiver maps without a copy; the rest is pickled. The
memory has no name, only holders: it is gone when the last of them is, however that one ends.
"""

import io
import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64
"""Bytes; of every array."""


def send(connection: Connection, value: Any, receiver: int) -> None:
    """Send a value that can be pickled to the process with id `receiver`. Tensors arrive on the CPU.

    Never waits for the receiver: what goes through the socket itself is a few bytes.

    Raises:
        OSError: the receiver is gone.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    *starts, end = _starts(sizes)
    file = os.memfd_create("parcel")
    try:
        os.truncate(file, end)
        for part, start in zip(parts, starts, strict=True):
            os.lseek(file, start, os.SEEK_SET)
            _write(file, part)
        connection.send_bytes(np.array(sizes, np.int64).tobytes())
        send_handle(connection, file, receiver)
    finally:
        os.close(file)


def receive(connection: Connection) -> Any:
    """The next value that was sent. Its arrays may be written to.

    Raises:
        EOFError, OSError: the sender is gone.
    """
    sizes = np.frombuffer(connection.recv_bytes(), np.int64).tolist()
    *starts, end = _starts(sizes)
    file = recv_handle(connection)
    try:
        memory = memoryview(mmap.mmap(file, end))
    finally:
        os.close(file)
    head, *arrays = (memory[start : start + size] for start, size in zip(starts, sizes, strict=True))
    return pickle.loads(head, buffers=arrays)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin, and where they end."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return starts


def _write(file: int, part: memoryview) -> None:
    """All of a part: one call writes 2 GiB at most."""
    part = part.cast("B")
    while part.nbytes:
        part = part[os.write(file, part) :]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        flat = value.detach().cpu().reshape(-1)
        return _tensor, (flat.view(torch.uint8).numpy(), value.dtype, value.shape)


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(data).view(dtype).reshape(shape)
