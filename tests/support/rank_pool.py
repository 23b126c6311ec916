"""Long-lived worker processes for tests that need several ranks.

    def sum_of_ranks(value): ...            # a top-level function: workers import it by name
    assert ranks.run(4, sum_of_ranks, 10) == [...]

Importing torch and megatron-core takes seconds, so it happens once: Python's fork server imports them
(warm_imports.py) and workers are forked from that process, which has neither threads nor process groups. Workers are
started on demand, serve many jobs, and meet in a fresh gloo process group for each. What a worker prints goes to a log
of its own, whose end is part of the error when its rank fails.
"""

import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

GRACE = 1.0
"""Seconds that the other ranks get to answer once one has failed, and to write their stacks once time is up."""


DEATH = "the process ended with exit code"


class RankError(Exception):
    """A rank raised, died or did not answer; the message names it and holds its traceback or stack."""


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    log: Path


class RankPool:
    """Worker processes 0, 1, ... of which a job of world size n uses the first n as ranks 0 to n - 1."""

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._jobs = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"{__package__}.warm_imports"])

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """`function(*args)` on every rank of a fresh process group; the results by rank.

        `function` is a module's top-level function; arguments and results are pickled by value. Raises RankError with
        the traceback of the rank that failed first, or with every rank's stack after `timeout` seconds.
        """
        assert 1 <= world_size <= self._limit, (world_size, self._limit)
        self._grow(world_size)
        self._jobs += 1
        store = Path(self._folder.name) / f"store-{self._jobs}"
        job = (function.__module__, function.__qualname__, args, world_size, str(store))
        messages = [pickle.dumps((rank, *job)) for rank in range(world_size)]
        logged = [worker.log.stat().st_size for worker in self._workers]
        try:
            for worker, message in zip(self._workers, messages, strict=False):
                worker.connection.send_bytes(message)
            return self._collect(world_size, time.monotonic() + timeout, logged)
        except BaseException:
            self._restart()
            raise

    def close(self) -> None:
        """End all workers."""
        self._restart()
        self._folder.cleanup()

    def _grow(self, size: int) -> None:
        while len(self._workers) < size:
            here, there = self._context.Pipe()
            log = Path(self._folder.name) / f"worker-{len(self._workers)}.log"
            log.touch()
            process = self._context.Process(target=_serve, args=(there, str(log)))
            process.start()
            there.close()
            self._workers.append(_Worker(process, here, log))

    def _restart(self) -> None:
        """Forget all workers; new ones are forked when needed."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
            worker.log.unlink()
        self._workers.clear()

    def _collect(self, world_size: int, deadline: float, logged: list[int]) -> list[Any]:
        """Wait for all ranks; their results by rank."""
        answers: dict[int, tuple[bool, Any]] = {}  # in order of arrival: the first failure is the cause of the others
        while len(answers) < world_size:
            waiting = {self._workers[rank].connection: rank for rank in range(world_size) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in map(waiting.__getitem__, ready):
                answers[rank] = self._receive(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        failures = [(rank, answer) for rank, (succeeded, answer) in answers.items() if not succeeded]
        # In order of arrival, but the dead first: another rank may tell of the lost connection sooner.
        reports = dict(sorted(failures, key=lambda failure: not failure[1].startswith(DEATH)))
        if reports:
            first = next(iter(reports))
            raise RankError(_describe(reports, world_size) + self._printed(first, logged[first]))
        if len(answers) < world_size:
            raise RankError(self._stacks(world_size, sorted(set(range(world_size)) - set(answers)), logged))
        return [answers[rank][1] for rank in range(world_size)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        worker = self._workers[rank]
        try:
            succeeded, answer = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            worker.process.join()
            return False, f"{DEATH} {worker.process.exitcode}"
        return succeeded, answer

    def _stacks(self, world_size: int, missing: list[int], logged: list[int]) -> str:
        """Why time ran out: what every rank is doing."""
        for worker in self._workers[:world_size]:
            os.kill(worker.process.pid, signal.SIGUSR1)
        time.sleep(GRACE)
        parts = [f"no answer from ranks {missing} of {world_size}; their stacks:"]
        parts += [f"rank {rank}{self._printed(rank, logged[rank])}" for rank in range(world_size)]
        return "\n".join(parts)

    def _printed(self, rank: int, start: int) -> str:
        """What a rank printed in this job, at most its last 4000 characters."""
        text = self._workers[rank].log.read_bytes()[start:].decode(errors="replace").strip()
        return f"\nprinted by rank {rank}:\n{text[-4000:]}" if text else ""


def _describe(reports: dict[int, str], world_size: int) -> str:
    """The first rank's report in full and a line for every other."""
    (rank, report), *others = reports.items()
    lines = [f"rank {rank} of {world_size} failed:", report]
    return "\n".join(lines + [f"then rank {other}: {text.strip().splitlines()[-1]}" for other, text in others])


def _serve(connection: Connection, log: str) -> None:
    """A worker's life: take a job, answer, clean up, until the pool is gone."""
    _redirect_output(log)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the pool, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            rank, module, name, args, world_size, store = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        faulthandler.unregister(signal.SIGUSR1)  # the job before may have had a handler of its own
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        try:
            function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            answer = (True, _in_process_group(rank, world_size, store, function, args))
            message = pickle.dumps(answer)
        except Exception:
            message = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(message)
        gc.collect()


def _in_process_group(rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple) -> Any:
    """One job on one rank. All ranks leave together, so that none closes a connection that another still reads."""
    from tests.support.warm_imports import parallel_state, torch

    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    result = function(*args)
    distributed.barrier()
    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()
    return result


def _redirect_output(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _end_with_parent() -> None:
    """Leave at once when the pool's process dies, even in the middle of a job."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
