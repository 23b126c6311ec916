"""`megabagel reshard` and `megabagel checkpoint inspect|verify|diff`: checkpoint folders offline, without ranks."""

import argparse
import re
from pathlib import Path

from megabagel.commands.words import positive
from megabagel.errors import UserError

SHOWN = 20


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    _add_reshard(commands)
    group = commands.add_parser("checkpoint", help="look into checkpoints, check and compare them", allow_abbrev=False)
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect",
        help="step, grid, versions and every tensor",
        description="Print step, grid, versions, and name, shape, type and bytes of every tensor of CKPT.",
        allow_abbrev=False,
    )
    inspect.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    verify = actions.add_parser(
        "verify",
        help="read everything and compare checksums",
        description="Read all of CKPT and compare sizes and checksums with its manifest. Exit code 2 if it is damaged.",
        allow_abbrev=False,
    )
    verify.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint folder")
    verify.set_defaults(run=_verify)
    diff = actions.add_parser(
        "diff",
        help="compare two checkpoints bit by bit",
        description="Compare all tensors of two checkpoints, from whatever grids. Exit code 1 if any differs.",
        allow_abbrev=False,
    )
    diff.add_argument("one", metavar="CKPT", type=Path, help="checkpoint folder")
    diff.add_argument("other", metavar="OTHER", type=Path, help="checkpoint folder")
    diff.set_defaults(run=_diff)


def _add_reshard(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "reshard",
        help="rewrite a checkpoint as another grid would have written it",
        description="Write checkpoint SRC as DST, as its grid with these changes would have written it. Every grid "
        "loads every checkpoint as it is; this is for storage tuned to a grid, and for leaving things out.",
        epilog="example: megabagel reshard runs/a/checkpoints/step_00000100 moved parallel.tp=4 --dp 2 --drop ema",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint folder")
    parser.add_argument("out", metavar="DST", type=Path, help="new folder")
    parser.add_argument("overrides", metavar="parallel.AXIS=N", nargs="*", help="AXIS is tp, pp, vpp or cp")
    parser.add_argument("--dp", metavar="N", type=positive, help="data-parallel size; default: that of SRC")
    parser.add_argument("--drop", metavar="WHAT", help="leave out optimizer, ema or optimizer,ema")
    parser.add_argument("--weights-only", action="store_true", help="the same as --drop optimizer,ema")
    parser.set_defaults(run=_reshard)


def _reshard(args: argparse.Namespace) -> int:
    changes = dict(map(_axis, args.overrides))
    if args.dp:
        changes["dp"] = args.dp
    drop = {"optimizer", "ema"} if args.weights_only else {what for what in (args.drop or "").split(",") if what}
    if drop - {"optimizer", "ema"}:
        raise UserError(f"--drop {args.drop}: expected optimizer, ema or optimizer,ema")
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.checkpoint.reshard import reshard

    grid = reshard(args.source, args.out, changes, drop)
    print(f"{args.out}: written as tp {grid.tp} x pp {grid.pp} x vpp {grid.vpp} x cp {grid.cp} x dp {grid.dp}")
    return 0


def _axis(word: str) -> tuple[str, int]:
    """`parallel.tp=2` -> ("tp", 2)."""
    found = re.fullmatch(r"parallel\.(tp|pp|vpp|cp)=([1-9]\d*)", word)
    if found is None:
        raise UserError(f"{word}: expected parallel.tp, pp, vpp or cp with a whole number, such as parallel.tp=2")
    return found[1], int(found[2])


def _inspect(args: argparse.Namespace) -> int:
    import json

    from megabagel.checkpoint.describe import as_text, describe

    about = describe(args.checkpoint)
    print(json.dumps(about, indent=1) if args.json else as_text(about))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megabagel.checkpoint.reader import verify

    manifest = verify(args.checkpoint)
    size = sum(sums.size for sums in manifest.files.values())
    print(f"{args.checkpoint}: whole: step {manifest.step:,}, {len(manifest.files):,} files, {size:,} bytes")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from megabagel.checkpoint.describe import differences

    found = list(differences(args.one, args.other))
    if not found:
        print(f"{args.one} and {args.other}: equal in every bit of every tensor")
        return 0
    found.sort(key=lambda d: (d.what == "numbers", -d.absolute))
    print(f"{args.one} and {args.other}: {len(found):,} tensors differ, the worst first")
    for d in found[:SHOWN]:
        numbers = f"{d.count:,} numbers, by at most {d.absolute:.3g} absolute, {d.relative:.3g} relative"
        print(f"  {d.key}: {numbers if d.what == 'numbers' else d.what}")
    if len(found) > SHOWN:
        print(f"  ... and {len(found) - SHOWN:,} more")
    return 1
