"""Engine `ray`: partitions as tasks of a Ray cluster (`pip install megabagel[curate-ray]`).

For clusters where CPU filters and GPU captioners stand side by side, or nodes come and go. Nodes share the output
folder. RAY_ADDRESS or `ray start` names the cluster; without one, Ray starts on this machine.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megabagel.curation.engines import DIED, Outcome
from megabagel.curation.output import Job
from megabagel.curation.partitions import Partition
from megabagel.errors import UserError, named


class Ray:
    """A cluster; `workers` tasks run at a time."""

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("--engine ray: Ray is not installed; pip install 'megabagel[curate-ray]'") from error
        self.ray: Any = ray
        self.workers = workers

    def run(self, job: Job, partitions: Sequence[Partition]) -> Iterator[Outcome]:
        """See `engines.Engine`."""
        ray = self.ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        # Without retries: a partition that kills its worker is counted here.
        remote = ray.remote(num_cpus=1, max_retries=0)(_work)
        waiting, at_work = list(reversed(partitions)), dict[Any, Partition]()
        try:
            while waiting or at_work:
                while waiting and len(at_work) < self.workers:
                    partition = waiting.pop()
                    at_work[remote.remote(job, partition)] = partition
                for task in ray.wait(list(at_work), num_returns=1)[0]:
                    yield self._outcome(task, at_work.pop(task))
        finally:
            for task in at_work:
                ray.cancel(task, force=True)

    def close(self) -> None:
        """See `engines.Engine`; the cluster belongs to its starter, and one of this process ends with it."""

    def _outcome(self, task: Any, partition: Partition) -> Outcome:
        errors = self.ray.exceptions
        try:
            return Outcome(partition, self.ray.get(task))
        except errors.RayTaskError as error:
            end = named(error.cause) if isinstance(error.cause, BaseException) else None
            raise end or RuntimeError(f"partition {partition.name} ({partition.files[0]}): {error}") from error
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            return Outcome(partition, DIED, type(error).__name__)


def _work(job: Job, partition: Partition) -> str:
    # Imported by the worker: the room's modules are on its PYTHONPATH as on the caller's.
    from megabagel.curation.worker import work

    return work(job, partition)


def engine(workers: int) -> Ray:
    """The cluster that RAY_ADDRESS names, or one on this machine."""
    return Ray(workers)
