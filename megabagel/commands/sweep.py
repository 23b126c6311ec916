"""`megabagel sweep`."""

import argparse
import sys
from pathlib import Path

from megabagel.commands.words import positive


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    sweep = commands.add_parser(
        "sweep",
        help="train points x seeds and compare them",
        description="Make the runs of a sweep file that are not finished, then one table and one picture.",
        epilog="example: megabagel sweep examples/sweeps/variants.yaml --jobs 2",
        allow_abbrev=False,
    )
    sweep.add_argument("file", metavar="FILE", type=Path, help="YAML file (docs/evaluation.md#sweeps)")
    sweep.add_argument("overrides", metavar="key=value", nargs="*", help="settings of every run")
    sweep.add_argument("--out", metavar="DIR", type=Path, help="folder of the runs; default: runs/sweeps/FILE's name")
    sweep.add_argument("--jobs", metavar="N", type=positive, default=1, help="runs at a time on this machine")
    part = sweep.add_mutually_exclusive_group()
    part.add_argument("--only", metavar="I", type=int, help="run I alone, from 0: a job of an array")
    part.add_argument("--table", action="store_true", help="make table and picture of what is there, run nothing")
    part.add_argument("--list", action="store_true", help="print the command of every run")
    sweep.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    from megabagel.log import configure_log
    from megabagel.sweep.plan import read_sweep
    from megabagel.sweep.report import write_report
    from megabagel.sweep.run import command, run_sweep

    configure_log(0)
    out = args.out or Path("runs/sweeps") / args.file.stem
    sweep = read_sweep(args.file, out, args.overrides)
    if args.list:
        for run in sweep.runs:
            print("megabagel", *command(sweep, run))
        return 0
    failed = {} if args.table else run_sweep(sweep, args.only, args.jobs)
    for folder, code in failed.items():
        print(f"megabagel: {folder} ended with code {code}; its log: {folder}/sweep.log", file=sys.stderr)
    if args.only is None:
        print(write_report(sweep, out), flush=True)
    return max(failed.values(), default=0)
