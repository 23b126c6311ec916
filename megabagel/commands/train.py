"""`megabagel train`."""

import argparse
import os
import sys
from pathlib import Path

from megabagel.commands.words import positive, refuse_second_launcher
from megabagel.errors import Interrupted
from megabagel.runtime.gpu_environment import prepare
from megabagel.runtime.launch import spawn
from megabagel.runtime.launch_env import read_launch_env
from megabagel.runtime.signals import StopRequest
from megabagel.train.saved import finished, interrupted


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train as CONFIG says: alone, as one rank of torchrun or srun, or on N ranks started here.",
        epilog="example: megabagel train examples/configs/tiny.yaml train.steps=50 parallel.tp=2 --nproc 2",
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of CONFIG")
    train.add_argument("--nproc", metavar="N", type=positive, help="start N ranks on this machine")
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from megabagel.config.load import load

    if args.nproc:
        refuse_second_launcher(os.environ)
    config = load(args.config, args.overrides)
    if args.nproc:
        from megabagel.config.checks import check_world

        check_world(config, args.nproc)
    # Not as one of several ranks: a shared disk may show them different states, and the others would wait.
    alone = args.nproc or (not os.environ.get("RANK") and read_launch_env()[1] == 1)
    if alone and (done := finished(config)):
        print(done)
        return 0
    if args.nproc:
        return spawn([sys.executable, "-m", "megabagel", "train", str(args.config), *args.overrides], args.nproc)
    prepare(config.parallel)  # read when torch is imported and when CUDA starts
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings about connections that end; ours name the rank
    with StopRequest() as stop:  # from here on: importing takes seconds
        from megabagel.runtime import cpu_backend

        cpu_backend.install()  # before anything imports megatron
        from megabagel.inference.training_samples import training_sampler
        from megabagel.train.run import main as run

        try:
            run(config, stop, training_sampler)
        except KeyboardInterrupt:
            raise Interrupted(interrupted(config)) from None
    return 0
