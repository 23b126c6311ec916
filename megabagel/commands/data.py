"""`megabagel data ...`."""

import argparse
from pathlib import Path
from typing import get_args

from megabagel.commands.words import positive
from megabagel.config.load import load
from megabagel.config.schema import Config, DataConfig, SourceConfig
from megabagel.data.documents import Task
from megabagel.errors import UserError, printable


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    data = commands.add_parser("data", help="make and inspect data", allow_abbrev=False)
    group = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(group)
    _add_index(group)
    _add_inspect(group)
    _add_stats(group)
    _add_latents(group)


def _add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = commands.add_parser(
        "prepare",
        help="make shards from a folder of images and texts",
        description="Write the images under IMAGES, each with the caption in the .txt file beside it, into shards; or "
        "edits, questions or clips: docs/data.md#plain-files has the names that each kind expects.",
        allow_abbrev=False,
    )
    prepare.add_argument("images", metavar="IMAGES", type=Path, help="folder of images and captions")
    prepare.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    prepare.add_argument(
        "--kind",
        choices=("captions", "edits", "questions", "clips"),
        default="captions",
        help="what the files are (default: captions)",
    )
    prepare.add_argument("--name", default="shards", help="shards are called NAME-000000.tar, ... (default: shards)")
    prepare.add_argument("--samples-per-shard", metavar="N", type=positive, default=1000, help="default: 1000")
    prepare.add_argument("--all", action="store_true", help="name every image that was left out, not one per reason")
    prepare.set_defaults(run=_prepare)


def _prepare(args: argparse.Namespace) -> int:
    from megabagel.data.builders.prepare import prepare

    report = prepare(args.images, args.out, samples_per_shard=args.samples_per_shard, name=args.name, kind=args.kind)
    print(printable(report.text(args.all), keep="\n"))
    return 0


def _add_index(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    index = commands.add_parser(
        "index",
        help="read every sample once, and name those that cannot be used",
        description="Index the sources of CONFIG, or one SOURCE: shards (tar, parquet, JSONL) or a folder of them.",
        epilog="example: megabagel data index 'pairs-*.tar' --task t2i --tokenizer tokenizer.json",
        allow_abbrev=False,
    )
    _add_source_words(index)
    index.add_argument("--check", action="store_true", help="compare the contents of shards with what was indexed")
    index.add_argument("--all", action="store_true", help="name every skipped sample, not the first 20 per source")
    index.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> int:
    from megabagel.data.builders.toy_shapes import ensure_dataset
    from megabagel.data.index.index import index_source
    from megabagel.data.index.index_report import survey
    from megabagel.data.tokenize.tokenizer import load_tokenizer

    data = _config(args).data
    ensure_dataset(data)
    tokenizer = load_tokenizer(data.tokenizer)
    for source in data.sources:
        index = index_source(data, source, tokenizer, check=args.check)
        told = survey(index, f"{source.name} ({source.task}): {source.path}", None if args.all else 20)
        print(printable(told, keep="\n"))
    return 0


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    inspect = commands.add_parser(
        "inspect",
        help="print and draw one sample as training sees it",
        description="Show a sample of a source of CONFIG, or of one SOURCE in the default sizes: its splits, mask, "
        "loss tokens, RoPE ids, texts as tokens, images after the transforms.",
        epilog="example: megabagel data inspect examples/configs/tiny.yaml --source edits --sample 7 --out edit.png",
        allow_abbrev=False,
    )
    _add_source_words(inspect)
    inspect.add_argument("--source", dest="entry", metavar="NAME", help="entry of data.sources (default: the first)")
    inspect.add_argument("--sample", metavar="KEY|N", default="0", help="key, or number from 0 (default: 0)")
    inspect.add_argument("--out", metavar="FILE", type=Path, help="draw it too: a .png, or a .html without other files")
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from megabagel.data.inspect.show import show

    print(printable(show(_config(args), args.entry, args.sample, args.out), keep="\n"))
    return 0


def _add_stats(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stats = commands.add_parser(
        "stats",
        help="count what the steps of a config hold",
        description="Plan the first N steps of CONFIG and count tokens per type, images, samples, skips and epochs.",
        epilog="example: megabagel data stats examples/configs/tiny.yaml --steps 200",
        allow_abbrev=False,
    )
    stats.add_argument("config", metavar="CONFIG", help="YAML file")
    stats.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of CONFIG")
    stats.add_argument("--steps", metavar="N", type=positive, default=100, help="steps to plan (default: 100)")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run=_stats)


def _stats(args: argparse.Namespace) -> int:
    from megabagel.data.builders.toy_shapes import ensure_dataset
    from megabagel.data.plan.global_plan import open_sources
    from megabagel.data.stats import count_steps
    from megabagel.data.tokenize.tokenizer import load_tokenizer

    config = load(args.config, args.overrides)
    ensure_dataset(config.data)
    stats = count_steps(config, open_sources(config, load_tokenizer(config.data.tokenizer)), args.steps)
    print(stats.as_json() if args.json else stats)
    return 0


def _add_latents(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    latents = commands.add_parser(
        "latents",
        help="compute once what the codec makes of every image",
        description="Write the codec's moments of every image that CONFIG generates or shows clean into OUT. Started "
        "again, only what is missing is added. Train with data.latents=OUT.",
        epilog="example: megabagel data latents examples/configs/tiny.yaml runs/tiny-latents",
        allow_abbrev=False,
    )
    latents.add_argument("config", metavar="CONFIG", help="YAML file")
    latents.add_argument("out", metavar="OUT", type=Path, help="folder of the cache")
    latents.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of CONFIG")
    latents.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of what is kept (default: fp32)"
    )
    latents.set_defaults(run=_latents)


def _latents(args: argparse.Namespace) -> int:
    from megabagel.data.builders.toy_shapes import ensure_dataset
    from megabagel.data.decode import choose_engine
    from megabagel.data.load.latents import write_latents
    from megabagel.data.plan.global_plan import open_sources
    from megabagel.data.tokenize.tokenizer import load_tokenizer
    from megabagel.model.vae import build_codec, codec_fingerprint
    from megabagel.runtime.device import current_device

    config = load(args.config, [*args.overrides, "data.latents=null"])
    data = config.data
    ensure_dataset(data)
    sources = open_sources(config, load_tokenizer(data.tokenizer))
    codec, device = build_codec(config.model.vae, current_device()), current_device()
    print(
        write_latents(
            *(config, sources, args.out, choose_engine(data.decode, device, data.decode_threads)),
            moments=lambda pixels: codec.moments(pixels.to(device)),
            codec=(codec_fingerprint(config.model.vae), codec.moment_channels),
            precision=args.precision,
        )
    )
    return 0


def _add_source_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG|SOURCE", help="YAML file, or a glob, a file or a folder of shards")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of CONFIG")
    parser.add_argument("--task", choices=get_args(Task), default="t2i", help="task of SOURCE (default: t2i)")
    parser.add_argument("--tokenizer", default="bytes", help="tokenizer of SOURCE (default: bytes)")
    parser.add_argument("--images", metavar="DIR", default="", help="folder of the images that JSONL files name")


def _config(args: argparse.Namespace) -> Config:
    """The config file, or the default config with the one source that the words describe."""
    if Path(args.source).suffix in (".yaml", ".yml"):
        return load(args.source, args.overrides)
    if args.overrides:
        raise UserError(
            f"{args.overrides[0]!r}: settings belong to a CONFIG. Describe a SOURCE by --task and the like."
        )
    source = SourceConfig(name="source", path=args.source, images=args.images, task=args.task)
    return Config(data=DataConfig(tokenizer=args.tokenizer, sources=(source,)))
