"""A worker: a process that applies one function to tasks and gives its results back in their order.

It is forked from a clean server process in which modules are imported and nothing runs, so no thread, lock or GPU
context of this process is copied. It ends when the connection does: also when this process is killed.
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
"""Signals to a whole job: what becomes of a worker is up to the process that it works for."""
_PR_SET_PDEATHSIG = 1
_TRANSIENT_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGBUS)
"""How the system ends a process for want of memory: SIGBUS where a page of shared memory cannot be had."""


@dataclass(frozen=True)
class Failed:
    """What a worker sends instead of a result."""

    error: Exception
    trace: str


class WorkerError(Exception):
    """An error of a worker whose own type cannot travel: pickling it, or the way back, fails. Named in the message."""


class WorkerTraceback(Exception):
    """Where in the worker an error came from: the cause of the error that is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Worker:
    """One process; use as a context manager.

    Args:
        name: in messages.
        work: the function; it is pickled, like tasks and results.
        describe: what a task is, for messages about it.
        late: called with a message when a result has not come for `timeout` seconds, again and again.
        modules: what `work` needs, imported once by the server and not by every process; of the first worker.
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
        """Sent, and their results not yet received."""
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, *modules])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), name=name, daemon=True)
        self.process.start()
        theirs.close()
        self.stop = util.Finalize(self, _stop, (self.connection, self.process), exitpriority=10)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def send(self, task: Any) -> None:
        """Give the worker one more task; it is taken at once, and done when those before it are."""
        self.tasks.append(task)
        with suppress(OSError):  # dead: `receive` says so, after the results that it left
            self.connection.send(task)

    def receive(self) -> Any:
        """The result of the oldest task.

        Raises:
            TransientFailure: the process was killed.
            UserError: it has died in another way.
            Exception: whatever `work` raised, or what kept its result from being sent.
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
    """The life of a worker. Tasks are taken as they come, so that the other side never waits to send one. What is
    logged goes with the result, to be logged there."""
    _end_with_parent()
    allow_open_files()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger().addHandler(QueueHandler(records))
    logging.getLogger().setLevel(logging.INFO)

    def listen() -> None:
        while True:
            try:
                tasks.put(connection.recv())
            except (EOFError, ConnectionError):
                os._exit(0)
            except BaseException as error:  # a task that cannot be unpickled here is an answer too, not silence
                tasks.put(_failed(error))

    threading.Thread(target=listen, daemon=True).start()
    while True:
        task = tasks.get()
        try:
            result = task if isinstance(task, Failed) else work(task)
        except BaseException as error:  # SystemExit as well: a library that exits would look like a killed process
            result = _failed(error)
        _answer(connection, result, [records.get() for _ in range(records.qsize())])


def _end_with_parent() -> None:
    """Be killed when the server process ends, which ends with the process that it works for: a worker that is stopped
    (SIGSTOP) would not see the end of its connection, and stay for ever.

    The server ends when nobody holds the other end of a pipe. Every process that it forks gets that end too (a private
    of multiprocessing), so that it can start more processes; a worker starts none, and lets it go.
    """
    server = os.getppid()
    if (alive := forkserver._forkserver._forkserver_alive_fd) is not None:  # type: ignore[attr-defined]
        os.close(alive)
        forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(0)


def _answer(connection: Connection, result: Any, records: list[logging.LogRecord]) -> None:
    """Send a result, or the error that keeps it from being sent."""
    try:
        shared_memory.send(connection, (result, records))
    except BrokenPipeError:
        os._exit(0)
    except BaseException as error:
        shared_memory.send_small(connection, (_failed(error), []))


def _failed(error: BaseException) -> Failed:
    """The error being handled, in a form that arrives: pickling forgets causes, and not every type comes back."""
    trace = traceback.format_exc()
    error = named(error) or error
    if isinstance(error, Exception):  # raised over there, SystemExit would end the run without a word
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return Failed(error, trace)
    return Failed(WorkerError(f"{type(error).__name__}: {error}"), trace)
