"""`megabagel serve`: a trained or published model over HTTP."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megabagel.commands.inference import model_parser, start
from megabagel.commands.words import positive
from megabagel.errors import UserError
from megabagel.runtime.launch_env import read_launch_env

_PACKAGES = ("starlette", "uvicorn")
"""The extra `serve` of setup.py."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = model_parser(
        commands,
        "serve",
        "serve a model over HTTP: OpenAI's API and a web page",
        "megabagel serve runs/demo --port 8000",
    )
    parser.add_argument("--port", metavar="P", type=_port, default=8000, help="0: any free one; default: 8000")
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="default: 127.0.0.1, this machine alone; for others set MEGABAGEL_API_KEY",
    )
    parser.add_argument("--name", metavar="NAME", help="of the model in requests; default: the name of CKPT's folder")
    limits = parser.add_argument_group("limits (docs/serving.md)")
    limits.add_argument(
        "--queue", metavar="N", type=positive, default=64, help="requests under way, more get 429; default: 64"
    )
    limits.add_argument(
        "--max-body", metavar="MIB", type=positive, default=32, help="of one request, more gets 413; default: 32"
    )
    limits.add_argument(
        "--max-pixels", metavar="N", type=positive, default=2**24,
        help="of all input images of one request, more get 413; default: 16777216",
    )  # fmt: skip
    limits.add_argument(
        "--drain", metavar="S", type=_seconds, default=30.0,
        help="seconds for running requests after SIGTERM or Ctrl-C; default: 30",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, found {text!r}")
    return seconds


def _run(args: argparse.Namespace) -> int:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"megabagel serve: {' and '.join(missing)} not installed; they are the extra `serve`: "
            "pip install 'megabagel[serve]', or pip install -e '.[serve]' in a checkout"
        )
    args.listener = None
    if not args.nproc and read_launch_env()[0] == 0:
        # Before the model is loaded, which may take minutes: an address in use is known now.
        from megabagel.serve.server import api_key, listen

        api_key()
        args.listener = listen(args.host, args.port)
    return start(args, _serve)


def _serve(args: argparse.Namespace, model: Any) -> int:
    from megabagel.log import configure_log
    from megabagel.serve.limits import MIB, Limits
    from megabagel.serve.server import serve

    rank, ranks, _ = read_launch_env()
    configure_log(rank)
    limits = Limits(body=args.max_body * MIB, pixels=args.max_pixels, queue=args.queue)
    name = args.name or _name(args.checkpoint)
    return serve(model, args.listener, name, limits, args.drain, ranks)


def _name(checkpoint: Path) -> str:
    """The folder's name; for a checkpoint inside a run, the run's."""
    folder = checkpoint.resolve()
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
