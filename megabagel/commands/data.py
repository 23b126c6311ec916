"""`megabagel data ...`."""

import argparse
from pathlib import Path

from megabagel.commands.words import positive


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    data = commands.add_parser("data", help="make and inspect data", allow_abbrev=False)
    group = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(group)


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
    prepare.add_argument("--samples-per-shard", metavar="N", type=positive, default=1000, help="default: 1000")
    prepare.set_defaults(run=_prepare)


def _prepare(args: argparse.Namespace) -> int:
    from megabagel.data.prepare import prepare

    print(prepare(args.images, args.out, samples_per_shard=args.samples_per_shard, name=args.name))
    return 0
