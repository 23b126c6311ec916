"""Worker processes: each applies one function to tasks and returns the results in the order of the tasks.

Workers are forked from a clean server process (multiprocessing's forkserver) that has imported the modules and runs no
threads, so no thread, lock or CUDA context of the training process is copied. A worker ends when its connection is
closed, which also happens when the training process is killed.
"""

import ctypes
import logging
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler
from multiprocessing import forkserver, get_context, util
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from megabagel.data.files import allow_open_files
from megabagel.data.load import shared_memory
from megabagel.errors import TransientFailure, UserError, named

IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a scheduler or terminal sends to all processes of a job. Workers ignore them: the training process
reacts (it may write a checkpoint first) and stops its workers itself."""
# From linux/prctl.h; Python has no binding.
_PR_SET_PDEATHSIG = 1
_TRANSIENT_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGBUS)
"""Signals that end a process for lack of memory (SIGBUS: a page of shared memory cannot be allocated) or from outside;
a restart may succeed."""


@dataclass(frozen=True)
class Failed:
    """Message that a worker sends instead of a result: the error, and its formatted traceback."""

    error: Exception
    trace: str


class WorkerError(Exception):
    """Stand-in for an error of a worker that cannot be pickled and unpickled; the message names its type."""


class WorkerTraceback(Exception):
    """The traceback in the worker, attached as the cause of the error that is raised in the training process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Worker:
    """One worker process; use as a context manager.

    Args:
        name: name of the worker in messages.
        work: the function; it is pickled, like tasks and results.
        describe: returns a description of a task for messages.
        timeout: seconds to wait for a result before `late` is called.
        late: called with a message each time that a result has been awaited for another `timeout` seconds.
        modules: modules that `work` needs, imported once by the fork server instead of by every worker. Only those of
            the first worker count: the server starts with it.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Any], Any],
        describe: Callable[[Any], str],
        timeout: float,
        late: Callable[[str], None],
        modules: Sequence[str] = (),
    ) -> None:
        self.name, self.describe, self.timeout, self.late = name, describe, timeout, late
        self.tasks: deque[Any] = deque()
        """Tasks that were sent and whose results have not been received."""
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, *modules])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), name=name, daemon=True)
        self.process.start()
        # This process must not hold the worker's end, else `receive` would not see it close when the worker dies.
        theirs.close()
        self.stop = util.Finalize(self, _stop, (self.connection, self.process), exitpriority=10)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def send(self, task: Any) -> None:
        """Queue one more task. Does not wait for the tasks before it."""
        self.tasks.append(task)
        # A dead worker is reported by `receive`, after the results that it sent before.
        with suppress(OSError):
            self.connection.send(task)

    def receive(self) -> Any:
        """Wait for the result of the oldest task and return it. Log records of the worker are logged here.

        Raises:
            TransientFailure: the process was killed by a signal of `_TRANSIENT_SIGNALS`.
            UserError: the process died in another way.
            Exception: any error of `work`, or of sending its result.
        """
        waited = 0.0
        try:
            while not self.connection.poll(self.timeout):
                waited += self.timeout
                self.late(f"{self._named()} has been at work for {waited:g} s or more on {self._oldest()}")
            result, records = shared_memory.receive(self.connection)
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        self.tasks.popleft()
        for record in records:
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        if isinstance(result, Failed):
            raise result.error from WorkerTraceback(result.trace)
        return result

    def _died(self) -> UserError:
        self.process.join(5)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        kind = TransientFailure if code is not None and -code in _TRANSIENT_SIGNALS else UserError
        return kind(
            f"{self._named()} died ({how}) at work on {self._oldest()}. If the system killed it for memory (signal 9), "
            "set data.workers or data.prefetch lower; if it always dies here, a file named above may be what kills it. "
            "Start again: the run goes on from its newest checkpoint."
        )

    def _named(self) -> str:
        return f"data: {self.name} (process {self.process.pid})"

    def _oldest(self) -> str:
        return self.describe(self.tasks[0]) if self.tasks else "nothing"


def _stop(connection: Connection, process: Any) -> None:
    connection.close()
    process.join(1)
    process.kill()
    process.join()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """Main loop of a worker process. Log records travel with each result and are logged by the receiver."""
    _end_with_parent()
    allow_open_files()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger().addHandler(QueueHandler(records))
    logging.getLogger().setLevel(logging.INFO)

    # Tasks are received in a thread, while `work` runs: the pipe never fills up, so the sender never blocks.
    def listen() -> None:
        while True:
            try:
                tasks.put(connection.recv())
            except (EOFError, ConnectionError):
                os._exit(0)
            # Every task needs a result, also one that cannot be unpickled here; else the receiver would wait for ever.
            except BaseException as error:
                tasks.put(_failed(error))

    threading.Thread(target=listen, daemon=True).start()
    while True:
        task = tasks.get()
        try:
            result = task if isinstance(task, Failed) else work(task)
        # SystemExit as well: otherwise a library that calls exit() would look like a process that died.
        except BaseException as error:
            result = _failed(error)
        _answer(connection, result, [records.get() for _ in range(records.qsize())])


def _end_with_parent() -> None:
    """Ask the kernel to kill this worker when the fork server ends, which ends with the training process.

    Closing the connection is not enough: a worker that is stopped (SIGSTOP) doesn't notice it and would stay for ever.
    """
    server = os.getppid()
    # A private of multiprocessing: the server ends when no process holds the other end of its "alive" pipe. Every
    # forked process inherits that end so that it can start processes itself; a worker starts none, and would only keep
    # the server alive.
    if (alive := forkserver._forkserver._forkserver_alive_fd) is not None:  # type: ignore[attr-defined]
        os.close(alive)
        forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The server may have ended before the call of prctl; then the signal never comes.
    if os.getppid() != server:
        os._exit(0)


def _answer(connection: Connection, result: Any, records: list[logging.LogRecord]) -> None:
    """Send a result, or the error that prevented sending it; exit if the receiver is gone."""
    try:
        shared_memory.send(connection, (result, records))
    except BrokenPipeError:
        os._exit(0)
    except BaseException as error:
        shared_memory.send_small(connection, (_failed(error), []))


def _failed(error: BaseException) -> Failed:
    """Convert the error being handled into a message that can be pickled.

    The traceback is formatted here because pickling drops causes and tracebacks. Types that cannot be pickled and
    unpickled are replaced by WorkerError.
    """
    trace = traceback.format_exc()
    error = named(error) or error
    # Not BaseException: SystemExit, raised again in the training process, would end the run without a message.
    if isinstance(error, Exception):
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return Failed(error, trace)
    return Failed(WorkerError(f"{type(error).__name__}: {error}"), trace)
