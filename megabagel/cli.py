"""The command `megabagel`.

A command imports what it needs when it runs, so that `--help` answers at once. A user's mistake ends in one message on
stderr and exit code 2, Ctrl-C in exit code 130.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megabagel.errors import UserError
from megabagel.launch import ERROR_PREFIX, USER_ERROR, spawn

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
    _add_train(commands)
    data = commands.add_parser("data", help="make and inspect data", allow_abbrev=False)
    _add_prepare(data.add_subparsers(title="commands", metavar="COMMAND", required=True))
    return parser


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train as CONFIG says: alone, as one rank of torchrun or srun, or on N ranks started here.",
        epilog="example: megabagel train examples/configs/tiny.yaml train.steps=50 parallel.tp=2 --nproc 2",
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of CONFIG")
    train.add_argument("--nproc", metavar="N", type=_positive, help="start N ranks on this machine")
    train.set_defaults(run=_train)


def _add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = commands.add_parser(
        "prepare",
        help="make shards from a folder of images and captions",
        description="Write the images under IMAGES, each with the caption in the .txt file beside it, into shards.",
        allow_abbrev=False,
    )
    prepare.add_argument("images", metavar="IMAGES", type=Path, help="folder of images and captions")
    prepare.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    prepare.add_argument("--name", default="shards", help="shards are called NAME-000000.tar, ... (default: shards)")
    prepare.add_argument("--samples-per-shard", metavar="N", type=_positive, default=1000, help="default: 1000")
    prepare.set_defaults(run=_prepare)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def _train(args: argparse.Namespace) -> int:
    from megabagel.config.load import load

    if args.nproc:
        _refuse_second_launcher(os.environ)
    config = load(args.config, args.overrides)
    if args.nproc:
        from megabagel.config.checks import check_world

        check_world(config, args.nproc)
        return spawn([sys.executable, "-m", "megabagel", "train", str(args.config), *args.overrides], args.nproc)
    from megabagel.parallel import host

    host.install()  # before anything imports megatron
    from megabagel.train.run import main as run

    run(config)
    return 0


def _refuse_second_launcher(env: Mapping[str, str]) -> None:
    """Raise `UserError` if this process is already one rank of a launch."""
    if "RANK" in env:
        found = f"RANK = {env['RANK']}"
    elif "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        found = f"SLURM_PROCID = {env['SLURM_PROCID']} of {env['SLURM_STEP_NUM_TASKS']} tasks"
    else:
        return
    raise UserError(
        f"--nproc starts ranks, but this process is one already ({found}); expected to be started once. "
        "Leave out --nproc under torchrun or srun, or unset the variable."
    )


def _prepare(args: argparse.Namespace) -> int:
    from megabagel.data.prepare import prepare

    print(prepare(args.images, args.out, samples_per_shard=args.samples_per_shard, name=args.name))
    return 0
