"""`megabagel bench` and `megabagel bench compare`."""

import argparse
import os
import sys
from pathlib import Path

from megabagel.commands.words import positive, refuse_second_launcher
from megabagel.errors import UserError
from megabagel.runtime.launch import spawn

DEFAULTS = {
    "nproc": None,
    "sweep": None,
    "warmup": 3,
    "steps": 10,
    "phases": 3,
    "synthetic": False,
    "profile": False,
    "out": Path("runs/bench"),
}
"""Defaults of the options, all of which concern measuring."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    bench = commands.add_parser(
        "bench",
        help="measure throughput, memory and where the time goes",
        description="Train some steps of CONFIG, write nothing of the run, and report how fast it was; or compare two "
        "reports: bench compare A.json B.json.",
        epilog="example: megabagel bench examples/configs/tiny.yaml parallel.tp=2 --nproc 2 --out runs/bench",
        allow_abbrev=False,
    )
    bench.add_argument("config", metavar="CONFIG|compare", help="YAML file, or the word compare")
    bench.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of CONFIG")
    bench.add_argument("--nproc", metavar="N", type=positive, help="start N ranks on this machine")
    bench.add_argument(
        "--sweep", metavar="FILE", type=Path, help="measure every grid of a YAML file, one after the other"
    )
    bench.add_argument("--warmup", metavar="N", type=positive, help="steps before (default: %(default)s)")
    bench.add_argument("--steps", metavar="N", type=positive, help="measured steps (default: %(default)s)")
    bench.add_argument("--phases", metavar="N", type=positive, help="steps to tell phases apart (default: %(default)s)")
    bench.add_argument("--synthetic", action="store_true", help="drawn sizes and noise instead of the sources' files")
    bench.add_argument("--profile", action="store_true", help="also write a trace and a memory snapshot")
    bench.add_argument("--out", metavar="DIR", type=Path, help="default: %(default)s")
    bench.set_defaults(run=_bench, **DEFAULTS)


def _bench(args: argparse.Namespace) -> int:
    if args.config == "compare":
        return _compare(args)
    if args.sweep:
        return _sweep(args)
    if args.nproc:
        _check(args, args.nproc, args.overrides)
        return _spawn(args, args.nproc, args.overrides, args.out)
    from megabagel.config.load import load

    config = load(Path(args.config), args.overrides)
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.bench.measure import Request
    from megabagel.bench.run import main

    profile = str(args.out) if args.profile else None
    main(
        config, Path(args.config).stem, Request(args.warmup, args.steps, args.phases, args.synthetic, profile), args.out
    )
    return 0


def _spawn(args: argparse.Namespace, nproc: int, overrides: list[str], out: Path) -> int:
    """Measure on `nproc` local ranks."""
    numbers = {"--warmup": args.warmup, "--steps": args.steps, "--phases": args.phases, "--out": out}
    options = [str(word) for pair in numbers.items() for word in pair] + ["--profile"] * args.profile
    options += ["--synthetic"] * args.synthetic
    return spawn([sys.executable, "-m", "megabagel", "bench", args.config, *overrides, *options], nproc)


def _check(args: argparse.Namespace, nproc: int, overrides: list[str]) -> None:
    """Raise UserError where `nproc` ranks cannot run the config."""
    from megabagel.config.checks import check_world
    from megabagel.config.load import load

    refuse_second_launcher(os.environ)
    check_world(load(Path(args.config), overrides), nproc)


def _sweep(args: argparse.Namespace) -> int:
    """Measure every grid in its own processes, up to the first that fails, then report them together.

    All grids are checked before the first is measured.
    """
    from megabagel.bench.output import merge
    from megabagel.bench.sweep import read_sweep

    if args.nproc:
        raise UserError(f"--sweep {args.sweep} --nproc {args.nproc}: the file says nproc of every grid; drop --nproc")
    grids = [(grid.nproc, [*args.overrides, *grid.overrides]) for grid in read_sweep(args.sweep)]
    for number, (nproc, overrides) in enumerate(grids):
        try:
            _check(args, nproc, overrides)
        except UserError as error:
            raise UserError(f"{args.sweep}: grids.{number}: {error}") from error
    parts: list[Path] = []
    code = 0
    for number, (nproc, overrides) in enumerate(grids):
        part = args.out / f"grid-{number}"
        code = _spawn(args, nproc, overrides, part)
        if code:
            break
        parts.append(part)
    if parts:
        merge(parts, args.out)
    return code


def _compare(args: argparse.Namespace) -> int:
    from megabagel.bench.compare import compare
    from megabagel.bench.report import read

    if given := [f"--{name}" for name, default in DEFAULTS.items() if getattr(args, name) != default]:
        raise UserError(f"bench compare: {', '.join(given)} is about measuring; expected two files and nothing else")
    if len(args.overrides) != 2:
        raise UserError(f"bench compare: {len(args.overrides)} files named; expected two: bench compare A.json B.json")
    a, b = (read(Path(path)) for path in args.overrides)
    print(compare(a, b))
    return 0
