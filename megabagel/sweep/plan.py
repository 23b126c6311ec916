"""A sweep as a file: one config, settings of all runs, the points that differ, and seeds.

config: ../configs/scenes.yaml          # relative to this file
nproc: 1                                # ranks per run
set: {train.steps: 240}                 # of every run
points:                                 # settings by name
  dense: {model.variant: dense}
  mot: {model.variant: mot}
seeds: [0, 1, 2]                        # train.seed; each point runs once with each
baseline: mot                           # the point that others are compared with; default: the first
metrics: [val_loss_mse, val_loss_ce]    # columns of metrics.jsonl; the first is drawn

Runs of equal seed see the same samples, timesteps and noise, since these are keyed: differences are taken seed by seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.config.load import load, to_dict
from megabagel.config.reading import read_file
from megabagel.config.schema import Config
from megabagel.config.yaml_text import MOST_BYTES, YamlError, dump_yaml, load_yaml
from megabagel.errors import UserError

KEYS = ("config", "nproc", "set", "points", "seeds", "baseline", "metrics")
METRICS = ("val_loss_mse", "val_loss_ce")


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    point: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    """All settings, `run.dir` and `train.seed` included."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    path: Path
    config: Path
    nproc: int
    runs: tuple[Run, ...]
    """All seeds of the first point, then of the second, ..."""
    baseline: str
    metrics: tuple[str, ...]

    @property
    def points(self) -> list[str]:
        """Names of the points, in order."""
        return list(dict.fromkeys(run.point for run in self.runs))

    def of(self, point: str) -> list[Run]:
        """Runs of a point, by seed."""
        return [run for run in self.runs if run.point == point]


def read_sweep(path: Path, out: Path, extra: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and check the config of every run.

    Args:
        path: the file.
        out: folder of the runs: OUT/POINT/seed_N.
        extra: `section.key=value` for every run, after those of the file.

    Raises:
        UserError: the file is no sweep, or a run's config is wrong.
    """
    try:
        tree = load_yaml(read_file(path, MOST_BYTES).decode())
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected a sweep file (docs/evaluation.md#sweeps)"
        ) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("config"), str):
        raise UserError(f"{path}: config is absent; expected the name of a config file, relative to the sweep")
    unknown = sorted(tree.keys() - set(KEYS))
    if unknown:
        raise UserError(f"{path}: {unknown[0]}: unknown key; expected {', '.join(KEYS)}")
    points, seeds = tree.get("points"), tree.get("seeds", [0])
    if not isinstance(points, dict) or not points or not all(isinstance(p, dict) for p in points.values()):
        raise UserError(
            f"{path}: points = {points!r:.60}; expected settings by name, such as mot: {{model.variant: mot}}"
        )
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds = {seeds!r:.60}; expected a list of numbers")
    names = list(map(str, points))
    baseline = str(tree.get("baseline", names[0]))
    if baseline not in names or any("/" in name or name.startswith(".") for name in names):
        raise UserError(f"{path}: baseline = {baseline!r}; expected one of {', '.join(names)}, plain names")
    common, runs = _words(path, "set", tree.get("set") or {}), []
    for name, settings in zip(names, points.values(), strict=True):
        for seed in dict.fromkeys(seeds):
            folder = out / name / f"seed_{seed}"
            last = (*extra, f"train.seed={seed}", f"run.dir={folder}")
            runs.append(Run(name, seed, folder, (*common, *_words(path, f"points.{name}", settings), *last)))
    nproc, metrics = tree.get("nproc", 1), tree.get("metrics", METRICS)
    if type(nproc) is not int or nproc < 1 or not metrics or not all(isinstance(name, str) for name in metrics):
        raise UserError(
            f"{path}: nproc = {nproc!r}, metrics = {metrics!r:.60}; expected a number and a list of columns"
        )
    sweep = Sweep(path, path.parent / tree["config"], nproc, tuple(runs), baseline, tuple(metrics))
    for run in sweep.runs:
        config_of(sweep, run)
    return sweep


def config_of(sweep: Sweep, run: Run) -> Config:
    """The config of a run.

    Raises:
        UserError: it is wrong, or the folder holds a run with other settings.
    """
    config = load(sweep.config, run.overrides)
    there = run.folder / "config.yaml"
    if there.is_file():
        mine, theirs = to_dict(config), to_dict(load(there))
        for section in ("model", "data", "train"):
            for key in mine[section]:
                if mine[section][key] != theirs[section][key] and (section, key) != ("train", "steps"):
                    raise UserError(
                        f"{run.folder}: was trained with {section}.{key}={theirs[section][key]!r:.60}, the sweep has "
                        f"{mine[section][key]!r:.60}; name another --out, or remove the folder"
                    )
    return config


def _words(path: Path, place: str, settings: Any) -> tuple[str, ...]:
    """Settings as `section.key=value`."""
    if not isinstance(settings, dict):
        raise UserError(f"{path}: {place} = {settings!r:.60}; expected settings such as {{train.steps: 240}}")
    return tuple(f"{key}={_word(value)}" for key, value in settings.items())


def _word(value: object) -> str:
    """A value on one line of YAML, without the document end that a scalar gets."""
    return dump_yaml(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
