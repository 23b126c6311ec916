"""`megabagel generate`, `edit`, `ask` and `chat`: a trained or published model from the command line."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabagel.commands.words import positive, refuse_second_launcher
from megabagel.errors import UserError
from megabagel.runtime.launch import spawn


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    draw = _parser(
        commands, "generate", "draw pictures from a text", 'megabagel generate runs/demo "a red circle" -n 4'
    )
    draw.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to draw; absent with --from")
    _add_drawing(draw)
    draw.set_defaults(run=lambda args: start(args, _generate))
    edit = _parser(
        commands, "edit", "change pictures as told", 'megabagel edit runs/demo in.png "make the circle blue"'
    )
    edit.add_argument("words", metavar="IMAGE ... INSTRUCTION", nargs="+", help="images, then what to change")
    _add_drawing(edit)
    edit.set_defaults(run=lambda args: start(args, _edit))
    ask = _parser(
        commands, "ask", "answer a question about images", 'megabagel ask runs/demo in.png "what colour is it?"'
    )
    ask.add_argument("words", metavar="IMAGE ... QUESTION", nargs="+", help="images (none is fine), then the question")
    ask.add_argument("--think", action="store_true", help="ask for a thought before the answer")
    _add_decoding(ask)
    ask.set_defaults(run=lambda args: start(args, _ask))
    chat = _parser(commands, "chat", "talk with the model in texts and images", "megabagel chat runs/demo")
    chat.add_argument("--size", metavar="WxH", type=picture_size, help="of pictures; default: as the last image")
    chat.add_argument("--steps", metavar="N", type=positive, help="grid points of pictures; default: 50")
    chat.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="where pictures go; default: here")
    _add_decoding(chat)
    chat.set_defaults(run=lambda args: start(args, _chat))


def _parser(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    parser = model_parser(commands, name, what, example)
    parser.add_argument("--seed", metavar="N", type=int, help="default: 0")
    parser.add_argument("--json", action="store_true", help="print a JSON line per result")
    return parser


def model_parser(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    """Declare a command over a loaded model, with the options that load it.

    Args:
        commands: group of the command line.
        name: of the command.
        what: it does, for --help.
        example: of a command line.
    """
    parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}. CKPT is a run folder, a checkpoint, or a folder as published.",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    parser.set_defaults(command=name)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="run, checkpoint or published folder")
    model_options(parser)
    return parser


def model_options(parser: argparse.ArgumentParser) -> None:
    """Declare how a model is loaded, for `start`."""
    parser.add_argument("--weights", choices=("ema", "trained"), help="default: averaged ones where there are any")
    parser.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="such as parallel.tp=2 or train.precision=bf16"
    )
    parser.add_argument(
        "--cache-tokens", metavar="N", type=positive, default=32768, help="tokens of the KV cache; default: 32768"
    )
    parser.add_argument("--nproc", metavar="N", type=positive, help="start N ranks on this machine")


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", metavar="N", type=positive, default=1, help="pictures, from seeds SEED, SEED + 1, ...; default: 1"
    )
    parser.add_argument(
        "--size",
        metavar="WxH",
        type=picture_size,
        help="pixels; default: largest trained square, or the last image's size",
    )
    parser.add_argument("--steps", metavar="N", type=positive, help="grid points: N - 1 evaluations; default: 50")
    parser.add_argument("--think", action="store_true", help="plan the picture in words first")
    parser.add_argument("--preset", metavar="NAME", help="settings of a released program (docs/inference.md)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="folder for the PNGs; default: here")
    parser.add_argument("--from", dest="source", metavar="FILE.png", type=Path, help="repeat what made this picture")
    guidance = parser.add_argument_group("guidance, instead of the preset's")
    guidance.add_argument("--text-scale", metavar="S", type=float)
    guidance.add_argument("--image-scale", metavar="R", type=float)
    guidance.add_argument("--interval", metavar="LO,HI", type=_interval)
    guidance.add_argument("--renorm", metavar="NAME", help="global, channel or text_channel")
    guidance.add_argument("--renorm-min", metavar="M", type=float)
    guidance.add_argument("--shift", metavar="K", type=float, help="of the timestep grid")
    guidance.add_argument(
        "--taylorseer", action="store_true", default=None, help="extrapolate most evaluations: faster, not exact"
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, default=1000, help="default: 1000")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: the likeliest token (default)")
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw from the likeliest tokens; default: 1"
    )


def picture_size(text: str) -> tuple[int, int]:
    """Read an argument WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1024x576, found {text!r}")
    return int(width), int(height)


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 0.4,1, found {text!r}") from error
    return low, high


def start(args: argparse.Namespace, action: Callable[[argparse.Namespace, Any], int]) -> int:
    """Run `action(args, model)` with the model of `args.checkpoint` on this rank, or start the ranks that do."""
    if args.nproc:
        refuse_second_launcher(os.environ)
        words = list(sys.argv[1:]) if sys.argv[1:] else []
        at = words.index("--nproc") if "--nproc" in words else None
        words = [w for w in words if not w.startswith("--nproc=")] if at is None else words[:at] + words[at + 2 :]
        return spawn([sys.executable, "-m", "megabagel", *words], args.nproc)
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.inference.api import Pipeline
    from megabagel.inference.load import open_source
    from megabagel.runtime.launch_env import read_launch_env

    source = open_source(args.checkpoint, args.weights, tuple(args.set))
    args.mesh = None  # the grid, for what does its own collectives
    args.writes = True  # whether this rank writes files; asking stdout instead lost pictures where it was redirected
    size = read_launch_env()[1]
    if size == 1:
        return action(args, Pipeline(source, None, args.cache_tokens))
    grid = source.config.parallel
    if (shards := grid.tp * grid.pp * grid.cp) != size:
        raise UserError(
            f"{args.command}: {size} ranks for a model on tp {grid.tp} x pp {grid.pp} x cp {grid.cp}; expected "
            f"{shards}, or another grid, such as --set parallel.tp={size} --nproc {size}"
        )
    from megabagel.parallel.mesh import distributed

    with distributed(source.config) as mesh:
        args.writes, args.mesh = mesh.world.first, mesh
        with Path(os.devnull).open("w") as nowhere:
            if not args.writes:
                sys.stdout = nowhere
            try:
                return action(args, Pipeline(source, mesh, args.cache_tokens))
            finally:
                sys.stdout = sys.__stdout__


def _generate(args: argparse.Namespace, model: Any) -> int:
    items, options = ([args.prompt] if args.prompt is not None else []), _drawing(args)
    if args.source:
        if items:
            raise UserError("generate: --from repeats a picture with its own prompt; leave out PROMPT")
        items, options = _repeated(args, model, [])
    elif not items:
        raise UserError("generate: no prompt; expected PROMPT or --from FILE.png")
    return _draw(args, model, items, options)


def _edit(args: argparse.Namespace, model: Any) -> int:
    if args.source:
        items, options = _repeated(args, model, [model.open(path) for path in args.words])
        return _draw(args, model, items, options)
    *paths, instruction = args.words
    if not paths:
        raise UserError(f"edit: only {instruction!r} given; expected at least one image, then the instruction")
    options = _drawing(args)
    options["preset"] = options["preset"] or "edit"
    return _draw(args, model, [*(model.open(path) for path in paths), instruction], options)


def _drawing(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `Pipeline.submit_draw` as given."""
    names = (
        "text_scale",
        "image_scale",
        "interval",
        "renorm",
        "renorm_min",
        "shift",
        "taylorseer",
        "preset",
        "think",
        "size",
    )
    return {name: getattr(args, name) for name in names} | {"points": args.steps, "n": args.n, "seed": args.seed or 0}


def _repeated(args: argparse.Namespace, model: Any, images: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Items and options of the picture that --from names; input images are checked by their digest."""
    from megabagel.inference.api import image_digest, read_metadata

    about = read_metadata(args.source)
    if about["digest"] != model.source.digest:
        raise UserError(
            f"{args.source}: was made by other weights (digest {about['digest'][:12]}, here {model.source.digest[:12]})"
        )
    if about["precision"] != model.config.train.precision:
        raise UserError(
            f"{args.source}: was made in {about['precision']}; add --set train.precision={about['precision']}"
        )
    given = iter(images)
    items: list[Any] = []
    for item in about["items"]:
        image = None if isinstance(item, str) else next(given, None)
        if not isinstance(item, str) and (image is None or image_digest(image) != item["sha256"]):
            raise UserError(
                f"{args.source}: was made from other input images; expected them, in the same order, and no instruction"
            )
        items.append(item if isinstance(item, str) else image)
    settings, guidance = about["settings"], about["settings"]["guidance"]
    options = {name: value for name, value in settings.items() if name != "guidance"} | guidance
    options["interval"] = tuple(options["interval"])
    size = (about["width"], about["height"])
    return items, options | {
        "size": size,
        "n": 1,
        "seed": about["seed"],
        "think": about["think"],
        "thought_tokens": about.get("thought_tokens"),
        "preset": about["preset"],
    }


def _make_folder(args: argparse.Namespace) -> None:
    """Make the folder of --out, on the rank that writes pictures."""
    try:
        if args.writes:
            args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be made ({error.strerror}); name a folder") from error


def _draw(args: argparse.Namespace, model: Any, items: list[Any], options: dict[str, Any]) -> int:
    from megabagel.inference.api import Step

    _make_folder(args)
    request = model.submit_draw(items, **options)
    began = time.monotonic()
    for event in model.stream(request):
        if isinstance(event, Step) and sys.stderr.isatty():
            done = event.number + 1
            left = (time.monotonic() - began) / done * (event.of - done)
            print(f"\rstep {done}/{event.of}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    if request.done.error:
        raise UserError(request.done.error)
    pictures = request.done.result
    for picture in pictures:
        path = args.out / f"{args.command}_seed{picture.about['seed']}.png"
        if args.writes:
            picture.save(path)
        print(json.dumps({"path": str(path), **picture.about}) if args.json else path, flush=True)
    if len(pictures) > 1 and args.writes:
        _contact_sheet(args, pictures)
    return 0


def _contact_sheet(args: argparse.Namespace, pictures: list[Any]) -> None:
    """All pictures of a request on one sheet."""
    from megabagel.train.contact_sheet import contact_sheet, png

    sheet = contact_sheet({f"seed {picture.about['seed']}": picture.pixels for picture in pictures})
    (args.out / f"{args.command}_sheet.png").write_bytes(png(sheet))


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p")
    return {name: getattr(args, name) for name in names} | {"seed": args.seed or 0}


def _ask(args: argparse.Namespace, model: Any) -> int:
    from megabagel.inference.api import Token

    *paths, question = args.words
    request = model.submit_answer([*(model.open(path) for path in paths), question], args.think, **_decoding(args))
    ids: list[int] = []
    for event in model.stream(request):
        if isinstance(event, Token) and not args.json and event.id != model.engine.special.eos:
            before = model.tokenizer.decode(ids)
            ids.append(event.id)
            print(model.tokenizer.decode(ids)[len(before) :], end="", flush=True)
    if request.done.error:
        raise UserError(request.done.error)
    answer = model.tokenizer.decode(request.done.result)
    print(json.dumps({"question": question, "answer": answer, "tokens": len(request.done.result)}) if args.json else "")
    return 0


HELP = "text: say it · /show FILE: add an image · /image TEXT: draw it (FILE numbers itself) · /quit"


def _chat(args: argparse.Namespace, model: Any) -> int:
    """Lines from standard input until it ends."""
    if sys.stdin.isatty():
        print(HELP, flush=True)
    _make_folder(args)
    number = 0
    with model.chat(**_decoding(args)) as chat:
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            try:
                if word == "/quit":
                    break
                if word == "/show":
                    chat.show(Path(rest))
                elif word == "/image":
                    options = {"points": args.steps} if args.steps else {}
                    picture = chat.draw(rest, size=args.size, seed=(args.seed or 0) + number, **options)
                    path, number = args.out / f"chat_{number}.png", number + 1
                    if args.writes:
                        picture.save(path)
                    print(json.dumps({"path": str(path), **picture.about}) if args.json else path, flush=True)
                elif line.strip():
                    answer = chat.say(line.strip())
                    print(json.dumps({"answer": answer}) if args.json else answer, flush=True)
            except UserError as error:
                print(f"megabagel: {error}", file=sys.stderr, flush=True)
    return 0
