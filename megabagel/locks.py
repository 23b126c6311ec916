"""Advisory lock of a folder: a command holds it while it writes there, so that two commands cannot write at once.

flock(2), because the kernel releases it with its process, also after kill -9, and NFS passes it to the server (Linux
turns it into a byte-range lock there); Lustre needs the mount option `flock`. Lock files made with O_EXCL were
rejected: nobody removes the file of a killed process, and its pid means nothing on another host. Python opens files
close-on-exec, so no worker process inherits the lock.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from megabagel.errors import TransientFailure, UserError, printable

PATIENCE_S = 5.0
"""Seconds that any start waits for the holder, which may have been killed a moment ago."""
_POLL_S = 0.1
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""errno values of file systems without locks, such as Lustre mounted without `flock`."""

logger = logging.getLogger(__name__)


def inside(folder: Path) -> Path:
    """Lock file inside a folder that exists or is extended."""
    return folder / ".lock"


def beside(folder: Path) -> Path:
    """Lock file beside a folder that does not exist yet."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def locked(
    file: Path, what: str, restart_wait: float = PATIENCE_S, alive: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lock `file` inside the block; the file is removed at the end. One left by a killed process does no harm.

    Args:
        file: created with its folder if absent; holds host, process and time of its owner, for messages.
        what: the folder as the user named it; starts the message.
        restart_wait: seconds to wait if this process is a later start of the same job: ranks of the earlier start may
            still be ending.
        alive: called repeatedly while waiting.

    Raises:
        UserError: another process holds the lock (a TransientFailure for a later start), or the file cannot be written.
    """
    again = restarted()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(file, what, max(restart_wait, PATIENCE_S) if again else PATIENCE_S, alive)
    except OSError as error:
        raise UserError(
            f"{what}: cannot be written ({error}), not even its lock; choose a folder with space and rights"
        ) from error
    if handle is None:
        raise (TransientFailure if again else UserError)(
            f"{what}: in use by {_owner(file)}. Two at once would overwrite each other's files: wait for its end, stop "
            "it, or name another folder."
        )
    try:
        yield
    finally:
        # Unlink while the lock is held: a waiting process that opened this file notices the change (`_same`). After the
        # release, unlink could remove a file that another process has locked meanwhile.
        file.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def claimed(file: Path, what: str) -> Iterator[bool]:
    """Hold the lock `file` inside the block if nobody else does; yields whether it is held. See `locked`.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(file, what, None, lambda: None)
    except OSError as error:
        raise UserError(
            f"{what}: its lock cannot be written ({error}); choose a folder with space and rights"
        ) from error
    try:
        yield handle is not None
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)
            os.close(handle)


def restarted(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher has started this job before: Slurm's requeue or torchrun's restart."""
    return any(env.get(name, "0") not in ("", "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _acquire(file: Path, what: str, seconds: float | None, alive: Callable[[], None]) -> int | None:
    """Return the descriptor that holds the lock, or None if another process still holds it after `seconds`.

    With None for `seconds` nothing waits and nothing is logged.
    """
    end, told = time.monotonic() + (seconds or 0.0), False
    while True:
        # Opened anew each time: the owner removes the file, and a lock on a removed file protects nothing.
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(handle, file):
                _sign(handle)
                return handle
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                logger.warning("%s: its file system has no locks (%s): nothing keeps out a second process", what, error)
                _sign(handle)
                return handle
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                os.close(handle)
                raise
        os.close(handle)
        if seconds is None or time.monotonic() > end:
            return None
        if not told:
            logger.warning("%s: in use by %s; waiting up to %g s for its end", what, _owner(file), seconds)
            told = True
        alive()
        time.sleep(_POLL_S)


def _same(handle: int, file: Path) -> bool:
    """Whether the locked file still has its name: its last owner may have removed it between open and lock."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Write the owner into the lock file. A full disk is ignored: the lock holds without it."""
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)


def _owner(file: Path) -> str:
    """Return the owner that the lock file names."""
    try:
        about = json.loads(file.read_bytes())
        text = "process {pid} on {host} since {since} ({command})".format_map(about)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    return printable(text, keep="\n")
