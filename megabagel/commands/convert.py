"""`megabagel import-hf` and `megabagel export-hf`."""

import argparse
from pathlib import Path

from megabagel.commands.words import positive
from megabagel.errors import UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    _add_import(commands)
    _add_export(commands)


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
    parts.add_argument("--latent-grid", metavar="N", type=positive, help="default: 64")
    parts.add_argument("--vit-grid", metavar="N", type=positive, help="default: 70")
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


def _import_hf(args: argparse.Namespace) -> int:
    parts = (args.llm, args.vit, args.vae)
    names = ("variant", "latent_grid", "vit_grid", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if (any(parts) or options) if args.source else not all(parts):
        raise UserError("import-hf: expected either DIR alone, or all of --llm, --vit and --vae; then OUT")
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    if args.source:
        from megabagel.checkpoint.hf.importer import import_folder

        print(import_folder(args.source, args.out))
    else:
        from megabagel.checkpoint.hf.parts import import_parts

        print(import_parts(*parts, args.out, **options))
    return 0


def _export_hf(args: argparse.Namespace) -> int:
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.checkpoint.hf.exporter import export

    print(export(args.checkpoint, args.out, args.weights, args.dtype, args.assets))
    return 0
