"""The command `megabagel`.

A command imports what it needs when it runs, so that `--help` answers at once. A user's mistake ends in one message on
stderr and exit code 2, Ctrl-C in exit code 130.
"""

import argparse
import os
import re
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
    _add_parity(commands)
    _add_import(commands)
    _add_export(commands)
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


def _add_parity(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parity = commands.add_parser(
        "parity",
        help="compare with numbers of the official model",
        description="Run golden cases of the official model and compare every number, on any grid.",
        epilog="exit code: 0 all rows ok, 1 a row fails, 2 a mistake in the input, 3 a kind of case not yet supported. "
        "example: megabagel parity cases/train_04_edit parallel.tp=2 --nproc 2",
        allow_abbrev=False,
    )
    parity.add_argument("overrides", metavar="CASE|key=value", nargs="+", help="cases and settings of the run")
    parity.add_argument("--nproc", metavar="N", type=_positive, help="start N ranks on this machine")
    parity.add_argument("--time", metavar="N", type=_positive, default=0, help="time N passes of each train_* case")
    parity.add_argument("--random-weights", action="store_true", help="for cases without weights and expected values")
    parity.add_argument("--json", metavar="FILE", type=Path, help="write everything that is printed")
    parity.set_defaults(run=_parity)


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "import-hf",
        help="make a checkpoint from published weights",
        description="Make checkpoint OUT from DIR, a folder laid out as the published BAGEL-7B-MoT, or from its parts.",
        epilog="example: megabagel import-hf BAGEL-7B-MoT bagel && "
        "megabagel train my.yaml run.init_from=bagel (with `base: bagel/model.yaml` in my.yaml)",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="DIR", nargs="?", type=Path, help="published folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the checkpoint")
    parts = parser.add_argument_group("from parts, instead of DIR")
    parts.add_argument("--llm", metavar="DIR", type=Path, help="Qwen2.5 folder")
    parts.add_argument("--vit", metavar="DIR", type=Path, help="SigLIP folder")
    parts.add_argument("--vae", metavar="FILE", type=Path, help="ae.safetensors of FLUX")
    parts.add_argument("--variant", choices=("mot", "moe", "dense"), help="default: mot")
    parts.add_argument("--latent-grid", metavar="N", type=_positive, help="default: 64")
    parts.add_argument("--vit-grid", metavar="N", type=_positive, help="default: 70")
    parts.add_argument("--seed", metavar="N", type=int, help="of weights that no part has; default: 0")
    parser.set_defaults(run=_import_hf)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export-hf",
        help="write a checkpoint as published weights",
        description="Write CKPT, a checkpoint folder from any grid, laid out as the published BAGEL-7B-MoT.",
        epilog="example: megabagel export-hf runs/a/checkpoints/step_00000100 exported --dtype bf16",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint folder")
    parser.add_argument("out", metavar="DIR", type=Path, help="new folder")
    parser.add_argument("--weights", choices=("ema", "trained"), help="default: ema if the checkpoint has them")
    parser.add_argument(
        "--dtype", choices=("as-stored", "bf16", "fp32"), default="as-stored", help="default: as-stored"
    )
    parser.add_argument("--assets", metavar="DIR", type=Path, help="copy config, tokenizer and autoencoder from here")
    parser.set_defaults(run=_export_hf)


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


def _parity(args: argparse.Namespace) -> int:
    cases = [Path(word) for word in args.overrides if not _is_override(word)]
    overrides = [word for word in args.overrides if _is_override(word)]
    if not cases:
        raise UserError("parity: no case named; expected the path of a golden case, such as cases/train_04_edit")
    if args.nproc:
        _refuse_second_launcher(os.environ)
        options = ["--random-weights"] * args.random_weights + (["--time", str(args.time)] if args.time else [])
        options += ["--json", str(args.json)] if args.json else []
        return spawn([sys.executable, "-m", "megabagel", "parity", *args.overrides, *options], args.nproc)
    from megabagel.parallel import host

    host.install()  # before anything imports megatron
    from megabagel.parity.run import Request, main

    return main(Request(tuple(cases), tuple(overrides), args.time, args.random_weights, args.json))


def _is_override(word: str) -> bool:
    """Whether a word is `section.key=value` and not a path."""
    return re.match(r"[a-z_]+(\.\w+)+=", word) is not None


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


def _import_hf(args: argparse.Namespace) -> int:
    parts = (args.llm, args.vit, args.vae)
    names = ("variant", "latent_grid", "vit_grid", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if (any(parts) or options) if args.source else not all(parts):
        raise UserError("import-hf: expected either DIR alone, or all of --llm, --vit and --vae; then OUT")
    from megabagel.parallel import host

    host.install()  # before anything imports megatron
    if args.source:
        from megabagel.checkpoint.official.importer import import_folder

        print(import_folder(args.source, args.out))
    else:
        from megabagel.checkpoint.official.parts import import_parts

        print(import_parts(*parts, args.out, **options))
    return 0


def _export_hf(args: argparse.Namespace) -> int:
    from megabagel.parallel import host

    host.install()  # before anything imports megatron
    from megabagel.checkpoint.official.exporter import export

    print(export(args.checkpoint, args.out, args.weights, args.dtype, args.assets))
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from megabagel.data.prepare import prepare

    print(prepare(args.images, args.out, samples_per_shard=args.samples_per_shard, name=args.name))
    return 0
