"""Errors that end a command with one message, without a traceback, and with an exit code of their own.

`EXITS` is the only table of exit codes: docs/faults.md#exit-codes shows it, and examples/slurm/train.sbatch requeues by
it.
"""

import errno
import re
from typing import NamedTuple

ERROR_PREFIX = "megabagel: error: "
"""Start of a UserError's message on stderr, the last thing its process prints."""
STOP_PREFIX = "megabagel: stopped: "
"""Start of a Stopped's message on stderr."""
USER_ERROR = 2
"""Exit code of a `UserError`."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, by the convention of shells."""
KILLED = 137
"""Exit code of a process ended by SIGKILL: 128 + 9."""


_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb]"
)
"""Control characters (ESC starts a terminal command), characters that reorder or hide text, and lone surrogates."""


def printable(text: str, keep: str = "") -> str:
    """Escape foreign text for terminals, logs and HTML: control characters, and bytes that are not UTF-8 as \\xNN.

    Args:
        text: text from a file, another rank or another program.
        keep: control characters to leave as they are, such as "\\n" in a message of several lines.
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

    The message names the key or file, the value found, the expectation and the next step. The command line prints it
    and exits with `code`; library callers may catch it.
    """

    code = USER_ERROR


class TransientFailure(UserError):
    """A failure of the machine rather than of the config: a killed worker, a full disk, an I/O error.

    74 is EX_IOERR of sysexits.h. Not 75, though a batch script requeues after both: nothing was saved here, so the
    script has to limit the number of retries.
    """

    code = 74


class Stopped(Exception):
    """A run that ends before its last step for a reason outside its config; the command exits with `code`."""

    code = 1


class Preempted(Stopped):
    """Stopped by a signal, with everything saved. 75 is EX_TEMPFAIL of sysexits.h: start the same command again."""

    code = 75


class Interrupted(Stopped):
    """Ctrl-C in a run: nothing more is saved; the message names the newest checkpoint."""

    code = INTERRUPTED


class RankLost(Stopped):
    """A rank died, hung or failed; the message names it. Steps after the newest checkpoint are lost."""

    code = 76


class BadStep(Stopped):
    """A step with an anomaly for which the config demands a stop; its samples were written out."""

    code = 77


class Corrupted(Stopped):
    """Copies of a weight differ, or a computation is not repeatable; the message names tensor and ranks.

    Not 78, which is EX_CONFIG of sysexits.h: another start, on other hosts, may well do.
    """

    code = 79


class Exit(NamedTuple):
    """A row of the table of exit codes."""

    code: int
    meaning: str
    again: str
    """Whether to start the same command again."""
    requeue: bool
    """Whether a batch script requeues the job."""


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
    Exit(
        Corrupted.code,
        "copies of a weight differ between ranks, or a micro-batch computed twice differs; the message names tensor "
        "and ranks. The newest checkpoint is from before",
        "yes, without the host of these ranks",
        True,
    ),
    Exit(INTERRUPTED, "Ctrl-C; the message says what is saved", "as you like", False),
    Exit(KILLED, "a rank ended by SIGKILL, by the system for memory most often", "yes, with less memory in use", True),
    Exit(141, "nobody reads the output any more (a closed pipe)", "as you like", False),
    Exit(1, "a bug, with its traceback", "after reporting it", False),
)
"""All exit codes of `megabagel train`. 128 + n stands for signal n where no other row does."""

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
"""errno values that another start, perhaps on another node, may not meet: failures of disk, network or memory."""


def no_space(text: str) -> OSError:
    """Return ENOSPC as an OSError for a disk that is known to be too small, before anything is written."""
    error = OSError(text)
    # Set after construction: OSError(errno, text) would print as "[Errno 28] text".
    error.errno = errno.ENOSPC
    return error


def is_transient(error: BaseException) -> bool:
    """Whether an error or one of its causes (`raise ... from`) is a failure of the machine, by `TRANSIENT`."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TransientFailure) or (isinstance(seen, OSError) and seen.errno in TRANSIENT):
            return True
        seen = seen.__cause__
    return False


def named(error: BaseException) -> UserError | Stopped | None:
    """Return the UserError or Stopped that `error` amounts to, or None for a bug.

    Code that writes files raises UserError `from` the OSError. Whether the user or the machine is the cause is decided
    here alone: where an error leaves its chain of causes (for another process or rank) and where the command ends.
    """
    if is_transient(error) and not isinstance(error, TransientFailure | Stopped):
        return TransientFailure(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    return error if isinstance(error, UserError | Stopped) else None


def exit_table() -> str:
    """Return `EXITS` as the Markdown table of docs/faults.md."""
    head = "| code | meaning | start the same command again? | a batch script requeues |\n| --- | --- | --- | --- |\n"
    rows = (f"| {x.code} | {x.meaning} | {x.again} | {'yes' if x.requeue else 'no'} |\n" for x in EXITS)
    return head + "".join(rows)
