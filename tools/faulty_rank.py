"""A rank of `megabagel` with a fault planted in it: python -m tools.faulty_rank FAULT train CONFIG ..."""

import sys
import time
from typing import Any

RANK, STEP = 1, 2
"""The rank and the step, counted from 0, in which it happens."""


def hang_in_data() -> None:
    """Wait for ever for a batch, as for a file system that does not answer."""
    from megabagel.data.load.loader import Loader

    steps = Loader.steps

    def stuck(loader: Any, count: int) -> Any:
        for number, step in enumerate(steps(loader, count)):
            if number == STEP:
                time.sleep(1e6)
            yield step

    Loader.steps = stuck  # type: ignore[method-assign]


def wrong_collective() -> None:
    """Wait for a message where the others add up losses."""
    import torch
    import torch.distributed as dist

    from megabagel.train.step import StepRunner

    reduce, calls = StepRunner._reduce, []

    def elsewhere(runner: Any, *args: Any) -> Any:
        calls.append(None)
        if len(calls) > STEP:
            dist.recv(torch.zeros(1), src=0)
        return reduce(runner, *args)

    StepRunner._reduce = elsewhere  # type: ignore[method-assign]


def bug() -> None:
    """Raise an error in a step."""
    from megabagel.train.step import StepRunner

    backward, calls = StepRunner.backward, []

    def broken(runner: Any, *args: Any) -> Any:
        calls.append(None)
        if len(calls) > STEP:
            raise ZeroDivisionError("a bug")
        return backward(runner, *args)

    StepRunner.backward = broken  # type: ignore[method-assign]


FAULTS = {"hang_in_data": hang_in_data, "wrong_collective": wrong_collective, "bug": bug}


def plant(name: str, rank: int) -> None:
    """Plant a fault if this is the rank for it."""
    if rank == RANK:
        FAULTS[name]()


if __name__ == "__main__":
    import os

    from megabagel.cli import main
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    plant(sys.argv[1], int(os.environ["RANK"]))
    sys.exit(main(sys.argv[2:]))
