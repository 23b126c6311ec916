"""Ends that a run names itself: each is one message, without a traceback, and has an exit code of its own."""

STOP_PREFIX = "megabagel: stopped: "
"""Opens the message of a `Stopped` on stderr."""


class UserError(Exception):
    """A mistake in a config, file, environment or command line.

    The message names the key or file, the value found, what was expected and the next step. The command line prints it
    and exits with code 2; library callers may catch it.
    """


class Stopped(Exception):
    """A run that ends before its last step for a reason outside its config; the command exits with `code`."""

    code = 1


class Preempted(Stopped):
    """Asked to stop by a signal; everything is saved. 75 is EX_TEMPFAIL of sysexits.h: start the same command again."""

    code = 75


class RankLost(Stopped):
    """A rank died, hung or failed; the message names it. What followed the newest checkpoint is lost."""

    code = 76


class BadStep(Stopped):
    """A step whose loss or gradient the config does not let pass; its samples were written out."""

    code = 77
