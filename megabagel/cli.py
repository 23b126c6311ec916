"""The command `megabagel`.

A command imports what it needs when it runs, so that `--help` answers at once. A user's mistake ends in one message on
stderr and exit code 2, a run that has to stop in one with a code of its own (errors.py), Ctrl-C in exit code 130.
"""

import argparse
import sys
from collections.abc import Sequence

from megabagel.commands import bench, checkpoint, convert, data, doctor, parity, plan, train
from megabagel.errors import STOP_PREFIX, Stopped, UserError
from megabagel.runtime.launch import ERROR_PREFIX, USER_ERROR

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's); return the exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives a list of positionals only one run of words; those after an option come back as the rest.
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        return args.run(args)
    except UserError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return USER_ERROR
    except Stopped as error:
        print(f"{STOP_PREFIX}{error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("megabagel: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megabagel",
        description="Train a BAGEL-like Mixture-of-Transformers on any TP x PP x CP x DP grid.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (train, bench, plan, parity, convert, checkpoint, data, doctor):
        group.add(commands)
    return parser
