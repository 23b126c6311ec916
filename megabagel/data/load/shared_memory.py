"""Transfer of objects with large arrays between processes: shared memory passed over a Unix socket.

Arrays and tensors travel in anonymous shared memory (memfd), which the receiver maps without a copy; the rest is
pickled. Anonymous memory has no name in the file system, so nothing has to be unlinked: the kernel frees it when the
last process that holds it ends, even if that process is killed.

Protocol: one byte that carries the file descriptor of the memory, then a message with the sizes of its parts; or, from
`send_small`, one byte without a descriptor, then the pickle itself. The descriptor is sent first because passing it can
fail (too many descriptors in flight): at that point nothing has been written, so the error can still be sent instead.
"""

import errno
import io
import mmap
import os
import pickle
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64
"""Alignment of every array in the shared memory, in bytes."""
_MEMORY, _INLINE = b"M", b"I"


def send(connection: Connection, value: Any) -> None:
    """Send a picklable value. Tensors arrive on the CPU.

    Does not block on the receiver, because only a few bytes go through the socket. If it raises anything but
    BrokenPipeError, nothing has been sent, and the caller may send something else.

    Raises:
        BrokenPipeError: the receiver is gone.
        OSError: no memory or no file descriptor is left.
        Exception: any error of pickling.
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
        with _socket(connection) as channel:
            socket.send_fds(channel, [_MEMORY], [file])
    finally:
        os.close(file)
    connection.send_bytes(np.array(sizes, np.int64).tobytes())


def send_small(connection: Connection, value: Any) -> None:
    """Send a value of a few kilobytes through the socket itself, without shared memory; for use after `send` failed."""
    data = pickle.dumps(value)
    with _socket(connection) as channel:
        channel.sendall(_INLINE)
    connection.send_bytes(data)


def receive(connection: Connection) -> Any:
    """Receive the next value. Its arrays are writable.

    Raises:
        EOFError, ConnectionError: the sender is gone.
        OSError: this process has no file descriptor left.
    """
    with _socket(connection) as channel:
        kind, files, _, _ = socket.recv_fds(channel, 1, 1)
    if not kind:
        raise EOFError
    message = connection.recv_bytes()
    if kind == _INLINE:
        return pickle.loads(message)
    # The kernel drops the descriptor without an error if this process has none left to give.
    if not files:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    try:
        sizes = np.frombuffer(message, np.int64).tolist()
        *starts, end = _starts(sizes)
        memory = memoryview(mmap.mmap(files[0], end))
    finally:
        os.close(files[0])
    head, *arrays = (memory[start : start + size] for start, size in zip(starts, sizes, strict=True))
    return pickle.loads(head, buffers=arrays)


def _socket(connection: Connection) -> socket.socket:
    """A second handle of a connection's socket, which the caller closes."""
    # A multiprocessing.Connection can't pass descriptors; the functions of `socket` for it need a socket object.
    return socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Aligned start offset of each part of these sizes, and the end of the last one, in bytes."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return starts


def _write(file: int, part: memoryview) -> None:
    """Write all bytes of a part."""
    # An empty buffer may have strides that `cast` refuses.
    if not part.nbytes:
        return
    # In a loop: one call of `write` takes at most 2 GiB.
    part = part.cast("B")
    while part.nbytes:
        part = part[os.write(file, part) :]


class _Pickler(pickle.Pickler):
    """Pickler that turns plain dense tensors into NumPy arrays, whose data goes out of band (protocol 5)."""

    def reducer_override(self, value: object) -> Any:
        if type(value) is not torch.Tensor or value.layout is not torch.strided:
            return NotImplemented
        return _tensor, (_bytes(value), value.dtype, value.shape)


def _bytes(value: torch.Tensor) -> np.ndarray:
    """The elements of a tensor of any shape and strides, in order, as uint8 [bytes]."""
    # Also correct for lazily conjugated or negated views, whose memory doesn't hold the values.
    flat = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    # `reshape` may return a view with a stride other than 1, which `view(uint8)` refuses: x[::2], one element of a
    # longer row, and empty tensors (numpy 2.4 makes those with stride 0).
    if flat.stride() != (1,):
        flat = torch.empty(flat.shape, dtype=flat.dtype, device="cpu").copy_(flat)
    return flat.view(torch.uint8).numpy()


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    # An empty array has a stride that `view(dtype)` refuses: see `_bytes`.
    if not data.size:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(data).view(dtype).reshape(shape)
