"""Ends of a command that have a name: each is one message, without a traceback, with an exit code of its own.

`EXITS` is the one table of exit codes; docs/faults.md shows it and examples/slurm/train.sbatch requeues by it.
"""

import errno
import re
from typing import NamedTuple

ERROR_PREFIX = "megabagel: error: "
"""Opens the message of a `UserError` on stderr, which is the last thing its process prints."""
STOP_PREFIX = "megabagel: stopped: "
"""Opens the message of a `Stopped` on stderr."""
USER_ERROR = 2
"""Exit code of a `UserError`."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as a shell counts."""
KILLED = 137
"""Exit code of a process that SIGKILL ended: 128 + 9."""


_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb]"
)
"""Controls (ESC begins a command to the terminal), characters that turn or hide text, and halves of characters."""


def printable(text: str, keep: str = "") -> str:
    """Foreign text for terminals, logs and HTML: control characters escaped, bytes that were no UTF-8 as \\xNN.

    keep: control characters to leave alone, such as "\\n" in a message of several lines.
    """

    def escape(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        if "\udc80" <= character <= "\udcff":  # a byte, see PEP 383
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape", "surrogatepass").decode()

    return _INVISIBLE.sub(escape, text)


class UserError(Exception):
    """A mistake in a config, file, environment or command line.

    The message names the key or file, the value found, what was expected and the next step. The command line prints it
    and exits with `code`; library callers may catch it.
    """

    code = USER_ERROR


class TransientFailure(UserError):
    """The machine failed, not the config: a worker was killed, a disk is full or broken. 74 is EX_IOERR of sysexits.h.

    Not 75, though both requeue: nothing was saved here, and a batch script has to bound how often it tries again.
    """

    code = 74


class Stopped(Exception):
    """A run that ends before its last step for a reason outside its config; the command exits with `code`."""

    code = 1


class Preempted(Stopped):
    """Asked to stop by a signal; everything is saved. 75 is EX_TEMPFAIL of sysexits.h: start the same command again."""

    code = 75


class Interrupted(Stopped):
    """Ctrl-C in a run: nothing is saved any more; the message says what was."""

    code = INTERRUPTED


class RankLost(Stopped):
    """A rank died, hung or failed; the message names it. What followed the newest checkpoint is lost."""

    code = 76


class BadStep(Stopped):
    """A step whose loss or gradient the config does not let pass; its samples were written out."""

    code = 77


class Exit(NamedTuple):
    """A row of the table of exit codes."""

    code: int
    meaning: str
    again: str
    """Whether the same command may be started again."""
    requeue: bool
    """Whether a batch script puts the job back into the queue."""


EXITS = (
    Exit(0, "all steps are done", "nothing left to do", False),
    Exit(USER_ERROR, "a mistake in config, files or environment; the message says which", "after mending it", False),
    Exit(
        TransientFailure.code,
        "the machine failed: a data worker was killed, a disk is full or reports an I/O error; the message says which. "
        "The newest checkpoint is untouched (`EX_IOERR` of sysexits.h)",
        "yes; a full disk wants room first",
        True,
    ),
    Exit(
        Preempted.code,
        "stopped by SIGTERM, SIGHUP or SIGUSR1; everything is saved (`EX_TEMPFAIL` of sysexits.h)",
        "yes, at once",
        True,
    ),
    Exit(RankLost.code, "a rank died, hung or failed; the message names it", "yes, perhaps without its host", True),
    Exit(BadStep.code, "a step that the config does not let pass (below)", "after looking at its samples", False),
    Exit(INTERRUPTED, "Ctrl-C; the message says what is saved", "as you like", False),
    Exit(KILLED, "a rank ended by SIGKILL, by the system for memory most often", "yes, with less memory in use", True),
    Exit(141, "nobody reads the output any more (a closed pipe)", "as you like", False),
    Exit(1, "a bug, with its traceback", "after reporting it", False),
)
"""Every exit code of `megabagel train`. 128 + n stands for signal n where no other row does."""

TRANSIENT = frozenset(
    (
        errno.EIO,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ESHUTDOWN,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENFILE,
    )
)
"""Numbers of OSErrors that another start, perhaps on another node, need not meet: of a disk, network or memory."""


def no_space(text: str) -> OSError:
    """The error of a disk that will not hold what is about to be written: ENOSPC before it is met."""
    error = OSError(text)
    error.errno = errno.ENOSPC  # with strerror unset the message stays `text`
    return error


def is_transient(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is a failure of the machine that another start need not meet."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TransientFailure) or (isinstance(seen, OSError) and seen.errno in TRANSIENT):
            return True
        seen = seen.__cause__
    return False


def named(error: BaseException) -> UserError | Stopped | None:
    """The end that `error` comes to by name, or None for a bug.

    Rooms turn what a disk refuses into a UserError `from` the OSError. Whether that is the user's to mend or the
    machine's is decided here alone: where an error leaves its chain of causes (for another process or rank) and where
    the command ends.
    """
    if is_transient(error) and not isinstance(error, TransientFailure | Stopped):
        return TransientFailure(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    return error if isinstance(error, UserError | Stopped) else None


def exit_table() -> str:
    """`EXITS` as docs/faults.md shows it."""
    head = "| code | meaning | start the same command again? | a batch script requeues |\n| --- | --- | --- | --- |\n"
    rows = (f"| {x.code} | {x.meaning} | {x.again} | {'yes' if x.requeue else 'no'} |\n" for x in EXITS)
    return head + "".join(rows)
