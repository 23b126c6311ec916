"""Engine `local`: a pool of processes on this machine.

Not concurrent.futures: after the death of one worker its pool is broken as a whole, and does not tell which task the
worker had. Here every worker has a pipe of its own, so that a death names its partition and costs one worker.
"""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megabagel.curation.engines import DIED, Outcome
from megabagel.curation.output import Job
from megabagel.curation.partitions import Partition
from megabagel.errors import TransientFailure, UserError, named

# Not fork: the caller may have threads, of a model or of a notebook.
_context = multiprocessing.get_context("spawn")


class Local:
    """A process pool; its processes stay from one pass to the next."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._idle: list[tuple[BaseProcess, Connection]] = []

    def run(self, job: Job, partitions: Sequence[Partition]) -> Iterator[Outcome]:
        """See `engines.Engine`."""
        waiting = list(reversed(partitions))
        at_work: dict[Connection, tuple[BaseProcess, Partition]] = {}
        try:
            while waiting or at_work:
                while waiting and len(at_work) < self.workers:
                    process, pipe = self._idle.pop() if self._idle else _start()
                    at_work[pipe] = process, waiting.pop()
                    pipe.send((job, at_work[pipe][1]))
                for ready in wait(list(at_work)):
                    assert isinstance(ready, Connection)
                    process, partition = at_work.pop(ready)
                    outcome = _outcome(process, ready, partition)
                    if outcome.status != DIED:
                        self._idle.append((process, ready))
                    yield outcome
        finally:
            for pipe, (process, _) in at_work.items():
                _end(process, pipe)

    def close(self) -> None:
        """End the processes."""
        while self._idle:
            _end(*self._idle.pop())


def _end(process: BaseProcess, pipe: Connection) -> None:
    process.kill()
    process.join()
    pipe.close()


def engine(workers: int) -> Local:
    """A pool of `workers` processes."""
    return Local(workers)


def _start() -> tuple[BaseProcess, Connection]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _outcome(process: BaseProcess, pipe: Connection, partition: Partition) -> Outcome:
    try:
        kind, text = pipe.recv()
    except (EOFError, OSError):
        pipe.close()
        process.join()
        code = process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(partition, DIED, how)
    if kind == "transient":
        raise TransientFailure(text)
    if kind == "user":
        raise UserError(text)
    if kind == "bug":
        raise RuntimeError(f"partition {partition.name} ({partition.files[0]}): {text}")
    return Outcome(partition, text)


def _serve(pipe: Connection) -> None:
    """Work on the jobs and partitions that come through the pipe, until it is closed."""
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from megabagel.curation.worker import work

    while True:
        try:
            job, partition = pipe.recv()
        except (EOFError, OSError):
            return
        reply: tuple[str, Any]
        try:
            reply = "outcome", work(job, partition)
        except BaseException as error:
            end = named(error)
            if end is None:
                reply = "bug", "".join(traceback.format_exception(error))
            else:
                reply = "transient" if isinstance(end, TransientFailure) else "user", str(end)
        try:
            pipe.send(reply)
        except OSError:  # the parent is gone; the partition is complete all the same
            sys.exit(0)
