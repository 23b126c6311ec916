"""Whether ranks belong together: which job a process is of, and what has to be equal on all ranks of one.

A rank with another learning rate, seed, code or library trains along without an error, to weights that nobody asked
for. So every rank states its facts at the roll call, and the first one that differs is named.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megabagel.config.load import to_dict
from megabagel.config.schema import Config
from megabagel.runtime.launch_env import TORCHRUN

LIBRARIES = (
    "torch megatron-core numpy triton transformer-engine safetensors pyarrow pillow tokenizers sentencepiece pyyaml"
)
"""Distributions whose version may change what is computed or read."""
_PACKAGE = Path(__file__).parents[1]


class Identity(NamedTuple):
    """Which start of which job a process belongs to, as its launcher's variables have it."""

    job: str
    step: str
    attempt: str

    @classmethod
    def of(cls, env: Mapping[str, str] = os.environ) -> "Identity":
        """Of a process with this environment. torchrun's ranks may be of several Slurm steps: one per node."""
        if env.get(TORCHRUN[0]):
            names = ("TORCHELASTIC_RUN_ID", "", "TORCHELASTIC_RESTART_COUNT")
        else:
            names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        job, step, attempt = (env.get(name) or "0" for name in names)
        return cls(job, step, attempt)

    def __str__(self) -> str:
        return f"job {self.job}, step {self.step}, start {self.attempt}"


def facts(config: Config | None) -> dict[str, str]:
    """What must be equal on all ranks before they form a group: settings, code, libraries; in the order of messages."""
    return {**(dict(_settings(to_dict(config))) if config else {}), **_software()}


def first_difference(by_rank: Mapping[int, Mapping[str, str]], places: Mapping[int, str]) -> str | None:
    """A message that names the first fact, and the lowest rank, that differs from rank 0's; None where none does.

    Args:
        by_rank: facts of every rank, 0 among them.
        places: host and process of every rank.
    """
    first = by_rank[0]
    others = [rank for rank in sorted(by_rank) if by_rank[rank] != first]
    if not others:
        return None
    rank = others[0]
    theirs = by_rank[rank]
    key = next(key for key in (*first, *theirs) if first.get(key) != theirs.get(key))
    more = f" (and {len(others) - 1} more ranks differ from rank 0)" if len(others) > 1 else ""
    return (
        f"{key} = {theirs.get(key, 'absent')} on rank {rank} ({places[rank]}), but {first.get(key, 'absent')} on "
        f"rank 0 ({places[0]}){more}: expected the same on all ranks. Start all of them with one command line, one "
        "installation and the same files."
    )


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(train.lr, 0.001) and so on."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if not items:
        yield key, json.dumps(value)
        return
    for name, part in items:
        yield from _settings(part, f"{key}.{name}" if key else str(name))


@lru_cache
def _software() -> dict[str, str]:
    found = {
        "megabagel source": _digest(),
        "python": platform.python_version(),
        "CUDA of torch": str(torch.version.cuda),
    }
    for name in LIBRARIES.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _digest() -> str:
    """Of all source files of the package: unlike a commit, it tells changed checkouts apart. 2 MB are read."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
