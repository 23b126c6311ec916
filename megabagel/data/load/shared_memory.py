"""Objects that hold large arrays, handed from one process to another over a Unix socket.

Arrays and tensors travel in anonymous shared memory, which the receiver maps without a copy; the rest is pickled. The
memory has no name, only holders: it is gone when the last of them is, however that one ends.

On the socket a value is one byte that carries the file descriptor of its memory, then a message with the sizes of its
parts; or, from `send_small`, one byte without a descriptor, then the pickle itself. The descriptor comes first because
passing one can fail (too many on their way): then nothing has been written yet, and the error can still be sent.
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
"""Bytes; of every array."""
_MEMORY, _INLINE = b"M", b"I"


def send(connection: Connection, value: Any) -> None:
    """Send a value that can be pickled. Tensors arrive on the CPU.

    Never waits for the receiver: what goes through the socket itself is a few bytes. Where it raises anything but
    BrokenPipeError nothing has been sent, and the caller may send something else.

    Raises:
        BrokenPipeError: the receiver is gone.
        OSError: no memory or no file descriptor is left.
        Exception: whatever pickling raises.
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
    """Send a value of a few kilobytes through the socket itself: what is left when `send` has failed."""
    data = pickle.dumps(value)
    with _socket(connection) as channel:
        channel.sendall(_INLINE)
    connection.send_bytes(data)


def receive(connection: Connection) -> Any:
    """The next value that was sent. Its arrays may be written to.

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
    """A second handle of a connection's socket, to be closed by the caller."""
    return socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin, and where they end."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return starts


def _write(file: int, part: memoryview) -> None:
    """All of a part: one call writes 2 GiB at most."""
    if not part.nbytes:
        return  # an empty buffer may have strides that no cast takes
    part = part.cast("B")
    while part.nbytes:
        part = part[os.write(file, part) :]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        if type(value) is not torch.Tensor or value.layout is not torch.strided:
            return NotImplemented
        return _tensor, (_bytes(value), value.dtype, value.shape)


def _bytes(value: torch.Tensor) -> np.ndarray:
    """The elements of a tensor of any shape and strides, in order, as uint8 [bytes].

    The copy is for what `reshape` leaves with a stride other than 1, which `view(uint8)` refuses: x[::2], one element
    of a longer row, and empty tensors (numpy 2.4 makes those with stride 0).
    """
    flat = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride() != (1,):
        flat = torch.empty(flat.shape, dtype=flat.dtype, device="cpu").copy_(flat)
    return flat.view(torch.uint8).numpy()


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if not data.size:
        return torch.empty(shape, dtype=dtype, device="cpu")  # not a view: see `_bytes`
    return torch.from_numpy(data).view(dtype).reshape(shape)
