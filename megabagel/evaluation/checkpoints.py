"""Checkpoints of a run in order of steps, and the number of tokens that each of them has seen."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megabagel.checkpoint.manifest import MANIFEST
from megabagel.errors import UserError


@dataclass(frozen=True)
class Seen:
    """Steps and tokens that a checkpoint was trained on."""

    step: int
    tokens: int | None
    """None where metrics.jsonl is absent or lacks a step."""
    tokens_gen: int | None


def checkpoints(path: Path, every: bool) -> list[Path]:
    """Return checkpoint folders, by step.

    Args:
        path: a run folder, or one checkpoint folder.
        every: all complete checkpoints of the run instead of the newest.

    Raises:
        UserError: there is no complete checkpoint, or `every` was asked of a single one.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a run or a checkpoint")
    if not (path / "checkpoints").is_dir():
        if every:
            raise UserError(f"{path}: --every-checkpoint needs a run folder, which has checkpoints/ in it")
        return [path]
    found = sorted(folder for folder in (path / "checkpoints").glob("step_*") if (folder / MANIFEST).is_file())
    if not found:
        raise UserError(f"{path}/checkpoints: no complete checkpoint yet; train longer, or set checkpoint.every lower")
    return found if every else found[-1:]


def seen(folder: Path) -> Seen:
    """Return step and tokens of a checkpoint, from its name and from metrics.jsonl of its run."""
    name = folder.resolve().name.removeprefix("step_")
    step = int(name) if name.isdecimal() else 0
    counts: dict[int, tuple[int, int]] = {}
    metrics = folder.resolve().parent.parent / "metrics.jsonl"
    for line in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            counts[record["step"]] = (record["tokens"], record["tokens_gen"])
    wanted = [counts.get(number) for number in range(1, step + 1)]
    if not step or None in wanted:
        return Seen(step, None, None)
    tokens, tokens_gen = (sum(pair[axis] for pair in wanted if pair) for axis in (0, 1))
    return Seen(step, tokens, tokens_gen)
