"""Files that appear whole or not at all, and how many may be open."""

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
"""As many open files as a process asks for: some systems allow so many that a library that goes through all is slow."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_UNUSABLE = {
    errno.EINVAL: "image is no regular file",
    errno.EFBIG: "image file too large",
    errno.ENXIO: "image is no regular file",
}
MAX_IMAGE_BYTES = 2**29
"""An image file with more bytes is not read: 512 MiB hold MAX_PIXELS of decode/headers.py in 16 bits, uncompressed."""


def allow_open_files() -> None:
    """Raise the soft limit of open files towards the hard one.

    The usual soft limit of 1024 is soon met: by the shards of many sources, and by results of workers on their way, of
    which Linux allows all processes of a user together no more than this limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < (most := min(hard, OPEN_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def image_fault(path: Path, detail: str, error: OSError) -> SampleError | UserError:
    """What to raise where an image file cannot be read: the sample's fault if there is no such file.

    Otherwise (no rights, a disk or network that fails, too many open files) it is nothing that may be kept on record.
    """
    if error.errno in _ABSENT:
        return SampleError("image is missing", detail)
    if reason := _UNUSABLE.get(error.errno or 0):
        return SampleError(reason, detail)
    return UserError(f"{path}: cannot be read ({error.strerror}). Mend its rights or its disk, and start again.")


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`: its files move up into `folder` when the block succeeds, else they vanish.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield stage
        for path in sorted(stage.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write one file so that a reader meets the old bytes or the new ones, never a part.

    Raises:
        OSError: the folder cannot be made or written.
    """
    with staging(path.parent) as stage:
        (stage / path.name).write_bytes(data)
