"""A list of grids to measure one after the other.

grids:                                   # ranks, then any keys of the config
  - {nproc: 1}
  - {nproc: 2, parallel.tp: 2}
  - {nproc: 4, parallel.pp: 2, parallel.cp: 2, train.packs_per_step: 8}
"""

from dataclasses import dataclass
from pathlib import Path

from megabagel.config.reading import read_file
from megabagel.config.yaml_text import MOST_BYTES, YamlError, dump_yaml, load_yaml
from megabagel.errors import UserError

_EXPECTED = "expected `grids:` with a list such as - {nproc: 2, parallel.tp: 2}"


@dataclass(frozen=True)
class Grid:
    """One measurement of a sweep."""

    nproc: int
    overrides: tuple[str, ...]


def read_sweep(path: Path) -> list[Grid]:
    """The grids of a file. Raises UserError."""
    try:
        tree = load_yaml(read_file(path, MOST_BYTES).decode())
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_EXPECTED}") from error
    grids = tree.get("grids") if isinstance(tree, dict) else None
    if not isinstance(grids, list) or not grids:
        raise UserError(f"{path}: no list `grids`; {_EXPECTED}")
    return [_grid(path, number, entry) for number, entry in enumerate(grids)]


def _grid(path: Path, number: int, entry: object) -> Grid:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: grids.{number} = {entry!r}; {_EXPECTED}")
    nproc = entry.get("nproc", 1)
    if isinstance(nproc, bool) or not isinstance(nproc, int) or nproc < 1:
        raise UserError(f"{path}: grids.{number}.nproc = {nproc!r}; expected a number of ranks, at least 1")
    overrides = (f"{key}={_word(value)}" for key, value in entry.items() if key != "nproc")
    return Grid(nproc, tuple(overrides))


def _word(value: object) -> str:
    """A value as `section.key=value` takes it."""
    return dump_yaml(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
