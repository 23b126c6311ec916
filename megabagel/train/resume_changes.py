"""Log of the config keys in which a resumed run differs from the run that wrote its checkpoint."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megabagel.checkpoint.manifest import CONFIG
from megabagel.config.load import to_dict
from megabagel.config.reading import read_file
from megabagel.config.schema import Config
from megabagel.config.typed import show
from megabagel.config.yaml_text import MOST_BYTES, YamlError, load_yaml

logger = logging.getLogger(__name__)

_SAME_NUMBERS = (
    *("run.", "telemetry.", "checkpoint."),
    *("data.root", "data.index_dir", "data.workers", "data.worker_timeout", "data.prefetch", "data.decode_threads"),
    *("data.val_sources", "train.val_every", "train.val_packs"),
    *("train.on_corruption", "train.recompute_check_every"),
)
"""Prefixes of keys that cannot change any computed value of a run."""


def log_changes(folder: Path, config: Config) -> None:
    """Log `key: old -> new` for every key that differs from a checkpoint's config, and the consequences."""
    try:
        old = load_yaml(read_file(folder / CONFIG, MOST_BYTES).decode())
    except (OSError, UnicodeDecodeError, YamlError) as error:
        # A warning and no error: the config file only serves this comparison; weights and state have checksums of their
        # own.
        logger.warning("the config of %s cannot be compared with this one: %s", folder, error)
        return
    changed = list(changes(old, to_dict(config)))
    for key, before, now in changed:
        logger.warning("changed since the checkpoint: %s: %s -> %s", key, _word(before), _word(now))
    if any(not key.startswith(_SAME_NUMBERS) for key, _, _ in changed):
        logger.warning("from here on the run is not bit for bit the one that wrote %s", folder.name)
    if any(key == "train.ema" and before and not now for key, before, now in changed):
        logger.warning("train.ema=0: the averaged weights of %s are dropped", folder.name)


def changes(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) for every difference; a missing value is ABSENT."""
    before, now = dict(_leaves(old)), dict(_leaves(new))
    for key in dict.fromkeys((*before, *now)):
        mine, theirs = before.get(key, ABSENT), now.get(key, ABSENT)
        # The type counts too: 1 == 1.0 == True in Python.
        if mine != theirs or type(mine) is not type(theirs):
            yield key, mine, theirs


ABSENT = object()


def _word(value: Any) -> str:
    """Return a value as the log shows it."""
    return "absent" if value is ABSENT else show(value)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf; entries of lists are keyed by their position."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if not entries:
        yield path, tree
        return
    for key, value in entries:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
