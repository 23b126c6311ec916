"""Atomic file writes, the limit of open files, and the classification of errors when an image file is read."""

import errno
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megabagel.data.documents import SampleError
from megabagel.errors import UserError

OPEN_FILES = 2**16
"""Upper bound of the soft limit that `allow_open_files` sets. The hard limit itself is not taken: on some systems it is
so large that libraries which iterate over all possible descriptors become slow."""

# Errors that say that there is no such file under this name; all others leave open whether the image exists.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_UNUSABLE = {
    errno.EINVAL: "image is no regular file",
    errno.EFBIG: "image file too large",
    errno.ENXIO: "image is no regular file",
}
MAX_IMAGE_BYTES = 2**29
"""Largest image file that is read: 512 MiB hold MAX_PIXELS of decode/headers.py with 16-bit channels, uncompressed."""


def allow_open_files() -> None:
    """Raise this process's soft limit of open files towards the hard limit.

    The usual soft limit of 1024 is too low for the shards of many sources, and for the results of loader workers: each
    is a file descriptor in flight over a socket, and Linux bounds those of all processes of a user by this limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < (most := min(hard, OPEN_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def image_fault(path: Path, detail: str, error: OSError) -> SampleError | UserError:
    """Turn an OSError of an image file into the error to raise.

    Returns:
        SampleError if the file does not exist or is no regular file: the sample is skipped, and the index records it.
        UserError otherwise (no permission, a failing disk or network, too many open files): such a fault may be gone in
        the next run, so it must not be recorded in the index as a property of the sample.
    """
    if error.errno in _ABSENT:
        return SampleError("image is missing", detail)
    if reason := _UNUSABLE.get(error.errno or 0):
        return SampleError(reason, detail)
    return UserError(f"{path}: cannot be read ({error.strerror}). Mend its rights or its disk, and start again.")


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Context manager: a temporary folder whose files move into `folder` when the block succeeds, else are deleted.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Inside `folder`, not in the system's temporary folder: `replace` is atomic only within one file system.
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield stage
        for path in sorted(stage.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write one file atomically: a concurrent reader gets the old bytes or the new ones, never a part.

    Raises:
        OSError: the folder cannot be made or written.
    """
    with staging(path.parent) as stage:
        (stage / path.name).write_bytes(data)
