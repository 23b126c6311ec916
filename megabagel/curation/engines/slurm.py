"""Engine `slurm`: one task of a job array (examples/slurm/curate.sbatch), with a process pool on its node.

Task i of n begins with partitions i, i + n, ... and then helps with what is left of the others, so that a task that is
queued late or lost holds up nothing; the claims of `worker.work` keep two tasks from one partition.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

from megabagel.curation.engines import Outcome
from megabagel.curation.engines.local import Local
from megabagel.curation.output import Job
from megabagel.curation.partitions import Partition
from megabagel.errors import UserError


class Slurm:
    """A task of an array."""

    def __init__(self, workers: int, env: Mapping[str, str] = os.environ) -> None:
        try:
            first = int(env.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(env.get("SLURM_ARRAY_TASK_STEP", "1"))
            self.rank = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step
            self.world = int(env["SLURM_ARRAY_TASK_COUNT"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"--engine slurm: no task of a job array ({error}); submit examples/slurm/curate.sbatch with --array"
            ) from error
        self.pool = Local(workers)

    def run(self, job: Job, partitions: Sequence[Partition]) -> Iterator[Outcome]:
        """See `engines.Engine`."""
        return self.pool.run(job, in_turn(partitions, self.rank, self.world))

    def close(self) -> None:
        """See `engines.Engine`."""
        self.pool.close()


def in_turn(partitions: Sequence[Partition], rank: int, world: int) -> list[Partition]:
    """The slice of a task, then the slices of the tasks after it."""
    return [partition for shift in range(world) for partition in partitions[(rank + shift) % world :: world]]


def engine(workers: int) -> Slurm:
    """The task of this process."""
    return Slurm(workers)
