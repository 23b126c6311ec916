"""Engines: who works on which partition. `local` is a process pool, `slurm` one task of an array, `ray` a cluster.

An engine calls `worker.work` once per partition, in any order, and yields what came of each. All that matters for the
result (claims, resume, counts, bytes) is in the output folder, so that engines can be exchanged between two runs, or
work on one folder at the same time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from megabagel.curation.output import Job
from megabagel.curation.partitions import Partition

ENGINES: Mapping[str, str] = {
    "local": "megabagel.curation.engines.local",
    "slurm": "megabagel.curation.engines.slurm",
    "ray": "megabagel.curation.engines.ray",
}
"""Modules by name; each has `engine(workers)`."""


@dataclass(frozen=True)
class Outcome:
    """What came of a partition."""

    partition: Partition
    status: str
    """worker.DONE, worker.BUSY, or DIED."""
    reason: str = ""
    """How a worker died."""


DIED = "died"


class Engine(Protocol):
    """Runs `work` on partitions."""

    def run(self, job: Job, partitions: Sequence[Partition]) -> Iterator[Outcome]:
        """Work on every partition once. Raises UserError of a worker, after the others have been stopped."""

    def close(self) -> None:
        """Give back processes; the engine is not used again."""


def engine_of(name: str, workers: int) -> Engine:
    """An engine by name. Raises UserError if it cannot be had here."""
    found: Engine = import_module(ENGINES[name]).engine(workers)
    return found
