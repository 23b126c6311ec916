"""`megabagel evaluate`: held-out loss, suites of abilities, and the comparison of their results."""

import argparse
import json
from pathlib import Path
from typing import Any

from megabagel.commands import evaluate_suite
from megabagel.commands.words import positive, respawned


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its subcommands."""
    parser = commands.add_parser(
        "evaluate",
        help="measure what a model has learned",
        description="Held-out loss and suites of abilities, of one checkpoint or of every checkpoint of a run.",
        allow_abbrev=False,
    )
    suites = parser.add_subparsers(title="suites", metavar="SUITE", required=True)
    _add_loss(suites)
    evaluate_suite.add(suites)
    report = suites.add_parser(
        "report",
        help="compare results with each other and with published numbers",
        description="One page of results of `evaluate SUITE`: a table per suite, published numbers, pictures.",
        epilog="example: megabagel evaluate report results/a results/b --out results",
        allow_abbrev=False,
    )
    report.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="folders of evaluations")
    report.add_argument("--out", metavar="OUT", type=Path, default=Path(), help="folder of report.md; default: here")
    report.set_defaults(run=_report)


def _add_loss(suites: Any) -> None:
    loss = suites.add_parser(
        "loss",
        help="held-out cross-entropy and flow loss",
        description="Losses of the held-out set (data.val_sources) by source, task and timestep.",
        epilog="example: megabagel evaluate loss runs/demo --every-checkpoint",
        allow_abbrev=False,
    )
    loss.add_argument("checkpoint", metavar="RUN|CKPT", type=Path, help="run folder or one of its checkpoints")
    loss.add_argument("--every-checkpoint", action="store_true", help="of the run, instead of the newest one")
    loss.add_argument("--weights", choices=("ema", "trained"), help="default: averaged ones where there are any")
    loss.add_argument("--out", metavar="DIR", type=Path, help="results; default: RUN/evaluation/loss")
    loss.add_argument("--set", metavar="key=value", action="append", default=[], help="setting of the run's config")
    loss.add_argument("--nproc", metavar="N", type=positive, help="start N ranks on this machine")
    loss.add_argument("--json", action="store_true", help="print a JSON line per checkpoint")
    loss.set_defaults(run=_loss)


def _report(args: argparse.Namespace) -> int:
    from megabagel.evaluation.report import write_report

    args.out.mkdir(parents=True, exist_ok=True)
    print(write_report(args.folders, args.out), flush=True)
    return 0


def _loss(args: argparse.Namespace) -> int:
    if args.nproc:
        return respawned(args.nproc)
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.evaluation.loss import evaluate_loss, table
    from megabagel.runtime.launch_env import read_launch_env

    path = args.checkpoint
    run = path if (path / "checkpoints").is_dir() else path.resolve().parent.parent
    out = args.out or run / "evaluation" / "loss"
    records = evaluate_loss(path, out, tuple(args.set), args.weights, args.every_checkpoint)
    if read_launch_env()[0] == 0:
        print("\n".join(map(json.dumps, records)) if args.json else table(records), flush=True)
    return 0
