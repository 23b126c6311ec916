"""Files that somebody else wrote, read with limits: regular files only, up to a number of bytes."""

import errno
import os
import stat
from pathlib import Path

from megabagel.errors import UserError


def read_file(path: Path, most: int) -> bytes:
    """The contents of a regular file, or of what a link to one stands for.

    Opening a FIFO waits for a writer and /dev/zero never ends, so the kind of the file is looked at first.

    Raises:
        OSError: it cannot be read (ValueError of a name with a NUL byte included), is no regular file (EINVAL), or has
            more than `most` bytes (EFBIG).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(errno.ENOENT, str(error), str(path)) from error
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            is_folder = stat.S_ISDIR(about.st_mode)
            number = errno.EISDIR if is_folder else errno.EINVAL
            raise OSError(number, "is a folder" if is_folder else "is no regular file", str(path))
        data = file.read(min(about.st_size, most) + 1)
        while len(data) <= most and (piece := file.read(2**20)):  # it grows, or is one of /proc without a size
            data += piece
    if len(data) > most:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes", str(path))
    return data


def read_own(path: Path, most: int, advice: str) -> bytes:
    """The same for a file that is the user's to mend. Raises UserError that ends with `advice`."""
    try:
        return read_file(path, most)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {advice}") from error
