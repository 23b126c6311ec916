"""`megabagel plan` and `megabagel dryrun`."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megabagel.commands.words import positive
from megabagel.errors import UserError

if TYPE_CHECKING:
    from megabagel.config.schema import Config
    from megabagel.planner.calibration import Calibration
    from megabagel.planner.estimate import Planner
    from megabagel.planner.grid import Grid, Precision


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    _add_plan(commands)
    _add_dryrun(commands)


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="which grid fits, and how fast it will be",
        description="Judge every legal grid of CONFIG on N GPUs: memory, step time, and what limits it.",
        epilog="example: megabagel plan examples/configs/bagel_7b_pt.yaml --gpus 64 --gpu h200 --explain tp=4,pp=1",
        allow_abbrev=False,
    )
    _add_config(parser)
    parser.add_argument("--gpus", metavar="N", type=positive, required=True, help="GPUs of the job")
    parser.add_argument("--gpu", metavar="GPU", required=True, help="a100, h100, h200, b200 or a YAML file")
    parser.add_argument("--explain", metavar="tp=..,pp=..", help="break one grid down; what is left out is CONFIG's")
    parser.add_argument("--precision", choices=("config", "any"), default="config", help="default: CONFIG's alone")
    parser.add_argument("--calibration", metavar="FILE", type=Path, help="bench.json with steps of CONFIG on that GPU")
    parser.set_defaults(run=_plan)


def _add_dryrun(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "dryrun",
        help="build a large job without its tensors and check that all ranks agree",
        description="Build stages, layouts and sharded state of ranks of a job that is not running, and check them.",
        epilog="example: megabagel dryrun examples/configs/bagel_7b_pt.yaml --world-size 4096 parallel.pp=4 "
        "parallel.cp=2. Exit code: 0 all agree, 1 something does not, 2 a mistake in the input.",
        allow_abbrev=False,
    )
    _add_config(parser)
    parser.add_argument("--world-size", metavar="N", type=positive, required=True, help="ranks of the job")
    parser.add_argument("--ranks", metavar="0,17,last", default="0,last", help="ranks to show (default: 0,last)")
    parser.set_defaults(run=_dryrun)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of CONFIG")


def _load(path: Path, overrides: list[str]) -> "Config":
    """The config of a run that is not to start here: files that it names need not lie on this machine."""
    from megabagel.config.load import load

    words = [*overrides, f"model.vae.path={path}", "run.init_from=null", "run.resume=none"]
    try:
        return load(path, words)
    except UserError:
        config = load(path, [*words, "data.latents=null"])  # tells of every other mistake
    return replace(config, data=replace(config.data, latents="elsewhere"))  # that the codec stays idle is what counts


def _plan(args: argparse.Namespace) -> int:
    config = _load(args.config, args.overrides)
    from megabagel.planner.hardware import find_gpu

    gpu = find_gpu(args.gpu)
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.planner import report
    from megabagel.planner.estimate import Planner
    from megabagel.planner.search import search, what_would_fit

    planner = Planner(config, gpu)
    if args.calibration:
        planner.constants = _calibrated(planner, args.calibration)
    if args.explain:
        print(report.opening(planner, args.gpus), report.explain(planner.estimate(_named(args, config))), sep="\n\n")
        return 0
    precisions: tuple[Precision, ...] = ("bf16", "fp32") if args.precision == "any" else (config.train.precision,)
    found = search(planner, args.gpus, precisions)
    if not found.fitting:
        remedy = what_would_fit(planner, args.gpus, precisions)
        raise UserError(report.refusal(planner, args.gpus, found, remedy))
    print(report.opening(planner, args.gpus), report.best(found), sep="\n\n")
    return 0


def _calibrated(planner: "Planner", path: Path) -> "Calibration":
    from megabagel.planner.calibration import corrected, read_measurements
    from megabagel.planner.estimate import Planner

    runs = read_measurements(path, planner.config, planner.gpu.name)
    ratios = []
    for run in runs:
        _check_grid(run.config, run.grid, f"--calibration {path}")
        predicted = Planner(run.config, planner.gpu, planner.constants).estimate(run.grid)
        ratios.append(run.seconds / predicted.time.seconds)
    return corrected(planner.constants, ratios, str(path))


def _named(args: argparse.Namespace, config: "Config") -> "Grid":
    """The grid of --explain."""
    from megabagel.planner.grid import Grid

    words = dict.fromkeys(("tp", "pp", "vpp", "cp", "recompute"))
    for word in args.explain.split(","):
        match = re.fullmatch(r"(tp|pp|vpp|cp)=([1-9]\d*)|(recompute)=(none|selective|full)", word.strip())
        if match is None:
            raise UserError(
                f"--explain {args.explain}: {word!r} is not understood; expected some of tp=N, pp=N, vpp=N, cp=N and "
                "recompute=none|selective|full, with commas between them"
            )
        words[match[1] or match[3]] = match[2] or match[4]
    p = config.parallel
    sizes = {name: int(words[name] or getattr(p, name)) for name in ("tp", "pp", "vpp", "cp")}
    replica = sizes["tp"] * sizes["pp"] * sizes["cp"]
    grid = Grid(
        **sizes, dp=args.gpus // replica, recompute=words["recompute"] or p.recompute, precision=config.train.precision
    )
    if replica > args.gpus:
        raise UserError(
            f"--explain {args.explain}: one replica takes {replica} GPUs, --gpus has {args.gpus}; start more"
        )
    _check_grid(config, grid, f"--explain {args.explain}", args.gpus)
    return grid


def _check_grid(config: "Config", grid: "Grid", place: str, gpus: int | None = None) -> None:
    from megabagel.planner.grid import why_illegal

    if wrong := why_illegal(grid.apply(config), gpus or grid.gpus):
        raise UserError(f"{place}: {wrong}")


def _dryrun(args: argparse.Namespace) -> int:
    config = _load(args.config, args.overrides)
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.planner.dryrun import dry_run

    outcome = dry_run(config, args.world_size, args.ranks)
    print(outcome.text)
    return 1 if outcome.findings else 0
