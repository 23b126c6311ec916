"""Jobs of several ranks that start in a fraction of a second, to be hurt: each rank is a process of its own.

Python's fork server imports torch and megatron-core once; every rank is forked from it and runs the command line, with
torchrun's variables set and its output in a file.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from secrets import token_hex
from typing import Any

from tools.faulty_rank import plant


class Job:
    """`megabagel train WORDS` on `size` ranks; what rank r prints goes to `folder`/rank-r.log."""

    def __init__(
        self, folder: Path, size: int, *words: object, fault: str | None = None, start: Sequence[int] = ()
    ) -> None:
        """Start the ranks `start` (default: all), with a fault of faulty_rank.py planted."""
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(size)]
        place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        self.port = place["MASTER_PORT"]
        place["MEGABAGEL_JOB_SECRET"] = token_hex(32)
        self.ranks: dict[int, BaseProcess] = {}
        for rank in start or range(size):
            self.logs[rank].write_text("")
            mine = {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
            args = ([*map(str, words)], mine, str(self.logs[rank]), fault)
            self.ranks[rank] = _context().Process(target=_run, args=args, daemon=True)
            self.ranks[rank].start()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks (default: all) that still run."""
        for rank in ranks or self.ranks:
            process = self.ranks[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, seconds: float, *ranks: int) -> dict[int, int]:
        """Exit codes of some ranks (default: all) once they have ended; the others are killed and reported as hung."""
        end = time.monotonic() + seconds
        waiting = [self.ranks[rank] for rank in ranks or self.ranks]
        try:
            while waiting and time.monotonic() < end:
                ready = wait([process.sentinel for process in waiting], timeout=end - time.monotonic())
                waiting = [process for process in waiting if process.sentinel not in ready]
            assert not waiting, f"ranks still run after {seconds:g} s:\n" + "\n".join(self.texts)
        finally:
            self.kill()
        return {rank: _code(process) for rank, process in self.ranks.items()}

    @property
    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(process.is_alive() for process in self.ranks.values())

    def kill(self) -> None:
        """End all ranks that still run."""
        self.signal(signal.SIGKILL)
        for process in self.ranks.values():
            process.join()

    @property
    def texts(self) -> list[str]:
        """What the ranks have printed."""
        return [log.read_text(errors="replace") if log.exists() else "" for log in self.logs]


def _code(process: BaseProcess) -> int:
    code = process.exitcode
    assert code is not None
    return code if code >= 0 else 128 - code


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.warm_imports"])
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(words: list[str], place: dict[str, str], log: str, fault: str | None) -> None:
    """A rank's life."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= {**place, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.current_process()._config["daemon"] = False  # a rank may have workers; it was a daemon over there
    import torch

    from megabagel import cli

    torch.set_num_threads(1)
    if fault:
        plant(fault, int(place["RANK"]))
    sys.exit(cli.main(["train", *words]))
