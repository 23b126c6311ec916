"""Newest checkpoint of a run and messages about it, read from the run folder alone.

The command line needs them before torch is imported and after the job has ended.
"""

import re
from pathlib import Path

from megabagel.config.load import load
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.runtime import phase


def newest(config: Config) -> tuple[Path, int] | None:
    """Return (folder, step) of the checkpoint that `latest` names, or None. Its content is not checked."""
    root = Path(config.run.dir) / "checkpoints"
    try:
        name = (root / "latest").read_text().strip()
    except (OSError, ValueError):
        return None
    found = re.fullmatch(r"step_(\d{8,})", name)
    return (root / name, int(found[1])) if found and (root / name / "manifest.json").is_file() else None


def finished(config: Config) -> str | None:
    """Return the message for a finished run that is started again with the same settings, or None.

    With other settings the run starts normally: the checkpoint may not fit them, which only loading it finds out.
    """
    saved, folder = newest(config), Path(config.run.dir)
    if config.run.resume != "auto" or saved is None or saved[1] < config.train.steps:
        return None
    try:
        same = load(folder / "config.yaml") == config
    except UserError:
        return None
    return f"{done(config, saved[1])} Its last checkpoint is {saved[0]}." if same else None


def done(config: Config, step: int) -> str:
    """Return the message that no step is left."""
    return (
        f"run.dir={config.run.dir}: all {config.train.steps} steps are done; train.steps=N with N above {step} goes on."
    )


def interrupted(config: Config) -> str:
    """Return the message after Ctrl-C: the saved step, and the number of steps lost since."""
    saved, step = newest(config), phase.now.step
    what = f"step {saved[1]} is saved in {saved[0]}" if saved else "no checkpoint was written yet"
    lost = step - (saved[1] if saved else 0)
    return (
        f"Ctrl-C after step {step} of {config.train.steps}: {what}, {max(lost, 0)} steps since are lost. Start the same"
        " command again to go on. SIGTERM (kill PID) in place of Ctrl-C saves first."
    )
