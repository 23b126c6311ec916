"""`megabagel parity`."""

import argparse
import os
import sys
from pathlib import Path

from megabagel.commands.words import is_override, positive, refuse_second_launcher
from megabagel.errors import UserError
from megabagel.runtime.launch import spawn


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parity = commands.add_parser(
        "parity",
        help="compare with numbers of the official model",
        description="Run golden cases of the official model and compare every number, on any grid.",
        epilog="exit code: 0 all rows ok, 1 a row fails, 2 a mistake in the input. "
        "example: megabagel parity cases/train_04_edit parallel.tp=2 --nproc 2",
        allow_abbrev=False,
    )
    parity.add_argument("overrides", metavar="CASE|key=value", nargs="+", help="cases and settings of the run")
    parity.add_argument("--nproc", metavar="N", type=positive, help="start N ranks on this machine")
    parity.add_argument("--time", metavar="N", type=positive, default=0, help="time N passes of each train_* case")
    parity.add_argument("--random-weights", action="store_true", help="for cases without weights and expected values")
    parity.add_argument("--json", metavar="FILE", type=Path, help="write everything that is printed")
    parity.set_defaults(run=_parity)


def _parity(args: argparse.Namespace) -> int:
    cases = [Path(word) for word in args.overrides if not is_override(word)]
    overrides = [word for word in args.overrides if is_override(word)]
    if not cases:
        raise UserError("parity: no case named; expected the path of a golden case, such as cases/train_04_edit")
    if args.nproc:
        refuse_second_launcher(os.environ)
        options = ["--random-weights"] * args.random_weights + (["--time", str(args.time)] if args.time else [])
        options += ["--json", str(args.json)] if args.json else []
        return spawn([sys.executable, "-m", "megabagel", "parity", *args.overrides, *options], args.nproc)
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.parity.run import Request, main

    return main(Request(tuple(cases), tuple(overrides), args.time, args.random_weights, args.json))
