"""The command `megabagel`.

A command imports what it needs when it runs, so that `--help` answers at once. A user's mistake ends in one message on
stderr and exit code 2, a run that has to stop in one with a code of its own (errors.py), Ctrl-C in exit code 130.
"""

import argparse
import sys
from collections.abc import Sequence

from megabagel.commands import bench, checkpoint, convert, data, doctor, inference, parity, plan, train
from megabagel.errors import ERROR_PREFIX, INTERRUPTED, STOP_PREFIX, Stopped, named


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
    except KeyboardInterrupt:
        print("megabagel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        end = named(error)
        if end is None:
            raise
        print(f"{STOP_PREFIX if isinstance(end, Stopped) else ERROR_PREFIX}{end}", file=sys.stderr)
        return end.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megabagel",
        description="Train a BAGEL-like Mixture-of-Transformers on any TP x PP x CP x DP grid.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (train, inference, bench, plan, parity, convert, checkpoint, data, doctor):
        group.add(commands)
    return parser
