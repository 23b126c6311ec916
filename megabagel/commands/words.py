"""Parsers and checks of command-line words that several commands share."""

import argparse
import os
import re
import sys
from collections.abc import Mapping

from megabagel.errors import UserError
from megabagel.runtime.launch import spawn
from megabagel.runtime.launch_env import refuse_foreign


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def is_override(word: str) -> bool:
    """Whether a word is `section.key=value` and not a path."""
    return re.match(r"[a-z_]+(\.\w+)+=", word) is not None


def refuse_second_launcher(env: Mapping[str, str]) -> None:
    """Raise `UserError` if this process is already one rank of a launch."""
    refuse_foreign(env)
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


def respawned(nproc: int, stage: tuple[str, ...] = ()) -> int:
    """Start this command line on `nproc` ranks of this machine; `stage` replaces its --stage options."""
    refuse_second_launcher(os.environ)
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in ("--nproc", *stage[:1]):
            kept.append(word)
        elif not equals:
            next(words, None)
    return spawn([sys.executable, "-m", "megabagel", *kept, *stage], nproc)
