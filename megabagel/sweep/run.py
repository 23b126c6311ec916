"""Running a sweep: each run is a `megabagel train` of its own, so a failed one leaves the others alone.

A run that is finished is not started again; one that was cut off goes on from its newest checkpoint.
"""

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megabagel.errors import UserError
from megabagel.sweep.plan import Run, Sweep, config_of
from megabagel.train.saved import newest

logger = logging.getLogger(__name__)

Launch = Callable[[Sequence[str], Path], int]
"""Runs a command with its output in a file; returns the exit code."""


def command(sweep: Sweep, run: Run) -> list[str]:
    """The command of a run, as a person would type it after `megabagel`."""
    ranks = ["--nproc", str(sweep.nproc)] if sweep.nproc > 1 else []
    return ["train", str(sweep.config), *run.overrides, *ranks]


def launch(words: Sequence[str], log: Path) -> int:
    """Run the command; both streams are appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        started = [sys.executable, "-m", "megabagel", *words]
        return subprocess.run(started, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def is_done(sweep: Sweep, run: Run) -> bool:
    """Whether a run has its last checkpoint."""
    config = config_of(sweep, run)
    saved = newest(config)
    return saved is not None and saved[1] >= config.train.steps


def run_sweep(sweep: Sweep, only: int | None = None, jobs: int = 1, start: Launch = launch) -> dict[str, int]:
    """Run what is not finished.

    Args:
        sweep: the plan.
        only: index of the one run to make, as a job of an array; None: all.
        jobs: runs at a time on this machine.
        start: runs a command.

    Returns:
        Exit code of each failed run, by folder.

    Raises:
        UserError: there is no run of this index.
    """
    if only is not None and not 0 <= only < len(sweep.runs):
        raise UserError(f"--only {only}: {sweep.path} has {len(sweep.runs)} runs; expected 0 to {len(sweep.runs) - 1}")
    chosen = sweep.runs if only is None else sweep.runs[only : only + 1]
    waiting = [run for run in chosen if not is_done(sweep, run)]
    logger.info("%s: %d of %d runs to make", sweep.path, len(waiting), len(chosen))

    def one(run: Run) -> int:
        logger.info("%s, seed %d: starts; log: %s", run.point, run.seed, run.folder / "sweep.log")
        return start(command(sweep, run), run.folder / "sweep.log")

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(one, waiting))
    return {str(run.folder): code for run, code in zip(waiting, codes, strict=True) if code}
