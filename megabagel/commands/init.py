"""`megabagel init`."""

import argparse
from pathlib import Path

from megabagel.errors import printable


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    init = commands.add_parser(
        "init",
        help="write a config for a folder of shards",
        description="Read the shards under DIR (tar, parquet, JSONL) once and write a commented config whose sources, "
        "image sizes and packs fit them.",
        epilog="example: megabagel init shards --out mine.yaml",
        allow_abbrev=False,
    )
    init.add_argument("folder", metavar="DIR", type=Path, help="folder of shards")
    init.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: NAME_OF_DIR.yaml)")
    init.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, *.model or bytes (default: bytes)")
    init.add_argument("--weights", metavar="DIR", type=Path, help="imported weights to start from (import-hf)")
    init.set_defaults(run=_init)


def _init(args: argparse.Namespace) -> int:
    from megabagel.data.starter_config import starter_config

    out = args.out or Path(f"{args.folder.resolve().name or 'data'}.yaml")
    told = starter_config(args.folder, out, tokenizer=args.tokenizer, weights=args.weights)
    print(printable(told, keep="\n"))
    return 0
