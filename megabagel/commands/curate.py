"""`megabagel curate ...`."""

import argparse
from pathlib import Path

from megabagel.commands.words import positive
from megabagel.errors import printable


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    curate = commands.add_parser(
        "curate",
        help="make training data from web pages, captioned pictures, videos and other shards",
        description="Curation by recipes of counted steps (docs/curation.md).",
        epilog="example: megabagel curate run examples/curation/web_small.yaml --in PAGES --out runs/web",
        allow_abbrev=False,
    )
    group = curate.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(group)
    _add_report(group)
    _add_show(group)


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser(
        "run",
        help="run a recipe over folders",
        description="Run RECIPE over the files of the input folders. Started again, it goes on where it was stopped; "
        "the shards in OUT/shards depend neither on the engine nor on the number of workers.",
        epilog="example: megabagel curate run examples/curation/web_small.yaml --in PAGES --out runs/web --workers 4",
        allow_abbrev=False,
    )
    run.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file")
    run.add_argument("--in", dest="inputs", metavar="DIR", type=Path, nargs="+", required=True, help="input folders")
    run.add_argument("--out", metavar="DIR", type=Path, required=True, help="output folder")
    run.add_argument(
        "--engine",
        choices=("local", "slurm", "ray"),
        default="local",
        help="processes of this machine, one task of a Slurm array, or a Ray cluster (default: local)",
    )
    run.add_argument("--workers", metavar="N", type=positive, default=1, help="processes at a time (default: 1)")
    run.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from megabagel.curation.recipe import load_recipe
    from megabagel.curation.report import report_on
    from megabagel.curation.run import curate
    from megabagel.log import configure_log

    configure_log(0)
    curate(load_recipe(args.recipe), args.inputs, args.out, args.engine, args.workers)
    print(printable(str(report_on(args.out)), keep="\n"))
    return 0


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser(
        "report",
        help="count what became of every record, document and picture",
        description="Print the counts of an output folder, by step and reason.",
        epilog="example: megabagel curate report runs/web",
        allow_abbrev=False,
    )
    report.add_argument("out", metavar="OUT", type=Path, help="output folder of `curate run`")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from megabagel.curation.report import report_on

    report = report_on(args.out)
    print(report.as_json() if args.json else printable(str(report), keep="\n"))
    return 0


def _add_show(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = commands.add_parser(
        "show",
        help="write a page with samples, and what each step did to them",
        description="Write an HTML page with the first samples of every partition, their sources and the notes of the "
        "steps, and examples of what was dropped.",
        epilog="example: megabagel curate show runs/web --samples 20 --page web.html",
        allow_abbrev=False,
    )
    show.add_argument("out", metavar="OUT", type=Path, help="output folder of `curate run`")
    show.add_argument("--samples", metavar="N", type=positive, default=20, help="samples to show (default: 20)")
    show.add_argument("--page", metavar="FILE", type=Path, help="the page (default: OUT/show.html)")
    show.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    from megabagel.curation.show import write_page

    page = args.page or args.out / "show.html"
    write_page(args.out, page, args.samples)
    print(printable(f"{page}"))
    return 0
