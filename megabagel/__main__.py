"""The program: `megabagel` and `python -m megabagel`."""

import signal
import sys

HELD = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to save and stop (`train.signals.HEEDED`, which cannot be imported yet)."""


def main() -> int:
    """Run the command line of this process; returns the exit code.

    Importing takes a second, in which such a signal would end a run without a word. So it is blocked here, before
    anything is imported, and delivered when `StopRequest` has its handlers, or when `launch.spawn` has started ranks:
    they inherit the block and lift it likewise.
    """
    if sys.argv[1:2] == ["train"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    from megabagel.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
