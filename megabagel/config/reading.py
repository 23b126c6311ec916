"""Reading of files from outside, with limits: regular files only, up to a number of bytes."""

import errno
import os
import stat
from pathlib import Path

from megabagel.errors import UserError


def read_file(path: Path, most: int) -> bytes:
    """Return the contents of a regular file; symbolic links are followed.

    Args:
        path: the file.
        most: size limit in bytes.

    Raises:
        OSError: it cannot be read (also if its name has a NUL byte), is not a regular file (EISDIR, EINVAL), or has
            more than `most` bytes (EFBIG).
    """
    # Opened with O_NONBLOCK and checked before reading: opening a FIFO would wait for a writer, and reading /dev/zero
    # would never end. The check is on the open descriptor, so the file cannot be exchanged in between.
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
        # The file may grow while it is read, and files of /proc report size 0.
        while len(data) <= most and (piece := file.read(2**20)):
            data += piece
    if len(data) > most:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes", str(path))
    return data


def read_own(path: Path, most: int, advice: str) -> bytes:
    """Return the contents of a file that the user can correct.

    Args:
        path: the file.
        most: size limit in bytes.
        advice: next step, the end of the error message.

    Raises:
        UserError: for every error of `read_file`.
    """
    try:
        return read_file(path, most)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {advice}") from error
