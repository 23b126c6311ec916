"""Command line `megabagel`.

Each command imports what it needs when it runs, so that `--help` is fast. A user's mistake ends in one message on
stderr and exit code 2, a run that has to stop in one with a code of its own (errors.py), Ctrl-C in exit code 130.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from megabagel.commands import (
    bench,
    checkpoint,
    convert,
    curate,
    data,
    doctor,
    evaluate,
    inference,
    init,
    parity,
    plan,
    posttrain,
    serve,
    sweep,
    train,
)
from megabagel.errors import ERROR_PREFIX, INTERRUPTED, STOP_PREFIX, USER_ERROR, Stopped, named, printable
from megabagel.log import PrintableFormatter

NOBODY_READS, UNFORESEEN = 141, 1
"""Exit codes; 141 is what a shell makes of SIGPIPE."""
TRACEBACK = "MEGABAGEL_TRACEBACK"
"""Environment variable: if set, unexpected errors are shown with their traceback."""
_RUNS = ("train", "bench")
"""Commands whose unexpected errors always show their traceback: what fails there is seldom a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's); return the exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives a list of positionals only one run of words; those after an option come back as the rest.
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        code = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a reader that is gone shows now at the latest
        return code
    except KeyboardInterrupt:
        _tell("megabagel: ", "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _give_up_stdout()
        return NOBODY_READS
    # Not only Exception: a panic in a Rust library (tokenizers, safetensors) is a BaseException.
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        end = named(error)
        if end is None:
            return _unforeseen(words, error)
        _tell(STOP_PREFIX if isinstance(end, Stopped) else ERROR_PREFIX, str(end))
        return end.code


def _unforeseen(words: Sequence[str], error: BaseException) -> int:
    """Print one line for an unexpected error, with the command line, which names the file being read."""
    _give_up_stdout()
    if os.environ.get(TRACEBACK) or (words[:1] and words[0] in _RUNS):
        traceback.print_exception(error)
        return UNFORESEEN
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    _tell(ERROR_PREFIX, f"{' '.join(words)[:300]}: {reason}. Set {TRACEBACK}=1 to see where it comes from.")
    return USER_ERROR if isinstance(error, OSError) else UNFORESEEN


def _tell(prefix: str, message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be gone, too
        print(f"{prefix}{printable(message, keep=chr(10))}", file=sys.stderr, flush=True)


def _prepare_streams() -> None:
    """Escape characters that a stream's encoding lacks, and terminal control characters in logs."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())


def _give_up_stdout() -> None:
    """Redirect stdout to /dev/null, so that the interpreter does not fail on its buffer again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megabagel",
        description="Train a BAGEL-like Mixture-of-Transformers on any TP x PP x CP x DP grid.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    used = (init, train, inference, serve, evaluate, sweep, posttrain)
    for group in (*used, bench, plan, parity, convert, checkpoint, data, curate, doctor):
        group.add(commands)
    return parser
