"""Identity of ranks: which job a process belongs to, and which facts must be equal on all of its ranks.

A rank with another learning rate, seed, code or library version would train without any error, to wrong weights. So
every rank publishes its facts at the roll call (`rendezvous.py`), and the first difference is reported by name.
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
    """Job, step and start of a process, from its launcher's variables."""

    job: str
    step: str
    attempt: str

    @classmethod
    def of(cls, env: Mapping[str, str] = os.environ) -> "Identity":
        """Return the identity of a process with this environment."""
        # torchrun first: its ranks may belong to several Slurm steps, one per node, so Slurm's variables would separate
        # them.
        if env.get(TORCHRUN[0]):
            names = ("TORCHELASTIC_RUN_ID", "", "TORCHELASTIC_RESTART_COUNT")
        else:
            names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        job, step, attempt = (env.get(name) or "0" for name in names)
        return cls(job, step, attempt)

    def __str__(self) -> str:
        return f"job {self.job}, step {self.step}, start {self.attempt}"


def facts(config: Config | None) -> dict[str, str]:
    """Return the facts that must be equal on all ranks, in the order of messages: settings, code, libraries."""
    return {**(dict(_settings(to_dict(config))) if config else {}), **_software()}


def first_difference(by_rank: Mapping[int, Mapping[str, str]], places: Mapping[int, str]) -> str | None:
    """Return a message about the lowest rank whose facts differ from rank 0's, or None.

    Args:
        by_rank: facts of every rank, including 0.
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
    """Yield (dotted key, JSON value) of every setting, such as (train.lr, 0.001)."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if not items:
        yield key, json.dumps(value)
        return
    for name, part in items:
        yield from _settings(part, f"{key}.{name}" if key else str(name))


@lru_cache
def _software() -> dict[str, str]:
    """Return versions of Python, CUDA and `LIBRARIES`, and a digest of this package's source."""
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
    """Digest of all source files of the package (2 MB): unlike a commit, it distinguishes modified checkouts."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
