"""Launcher for one machine (`--nproc`): starts the ranks of a run and ends them together, as torchrun does.

Rank 0 writes directly to the terminal. Of the other ranks only stderr is shown, each line prefixed with its rank. A
user's mistake is shown once, without its consequences on other ranks.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from secrets import token_hex
from types import FrameType

from megabagel.errors import (
    ERROR_PREFIX,
    INTERRUPTED,
    STOP_PREFIX,
    USER_ERROR,
    BadStep,
    Preempted,
    RankLost,
    TransientFailure,
)
from megabagel.runtime.signals import HEEDED, ignored, leave_terminal

SECRET = "MEGABAGEL_JOB_SECRET"
"""Equal to `signed_store.SECRET`, whose module needs torch."""

_VERDICTS = (USER_ERROR, TransientFailure.code, Preempted.code, BadStep.code, INTERRUPTED)
"""Exit codes of ends that all ranks reach together, with one message."""
_NAMED = (*_VERDICTS, RankLost.code)
"""Exit codes of ends whose message is complete; the launcher adds no line of its own."""

_POLL_S = 0.05
_SETTLE_S = 2.0
"""Seconds for the other ranks to end by themselves, with the same mistake or because they lost a rank."""
_LAST_WORDS = (ERROR_PREFIX, STOP_PREFIX, "Traceback (most recent call last)")
"""Prefixes of the final messages of an ending process."""
_TERM_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""
_DRAIN_S = 1.0
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGINT, *HEEDED)


@dataclass
class _Rank:
    """One started process."""

    index: int
    process: subprocess.Popen[str]
    held: list[str] = field(default_factory=list)
    """Final lines of its stderr, not shown yet."""
    reader: threading.Thread | None = None


def spawn(command: Sequence[str], nproc: int) -> int:
    """Run `command` as `nproc` ranks and wait until all have ended.

    Ranks get RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and a new secret in
    MEGABAGEL_JOB_SECRET unless one is set. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on. When one rank fails, the
    others are stopped.

    Signals that the caller has blocked (`__main__.py`) are blocked in the ranks too, and passed on once all have
    started.

    Returns:
        0, or the exit code of the rank that failed first (128 + n for signal n). Ranks that ended because they lost
        another one do not count.
    """
    ranks: list[_Rank] = []
    with _forwarding(ranks):
        try:
            port, secret = _free_port(), token_hex(32)
            for index in range(nproc):
                ranks.append(_start(command, index, nproc, port, secret))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)
            for rank in ranks[1:]:
                _read_stderr(rank)
            failed = _first_failure(ranks)
            if failed:
                failed = _cause(failed, ranks)
            _report(failed, ranks)
        finally:
            _stop(ranks)
    return _exit_code(failed.process) if failed else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: Sequence[str], index: int, nproc: int, port: int, secret: str) -> _Rank:
    """Start one rank in its own session, so that Ctrl-C reaches it once, through this process."""
    place = {
        "RANK": index,
        "LOCAL_RANK": index,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    process = subprocess.Popen(
        command,
        env={
            "OMP_NUM_THREADS": str(max(1, cpus // nproc)),
            SECRET: secret,
            **os.environ,
            **{name: str(value) for name, value in place.items()},
        },
        stdin=subprocess.DEVNULL,
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=None if index == 0 else subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_die_with_parent(),
    )
    return _Rank(index, process)


def _die_with_parent() -> Callable[[], None] | None:
    """Return a function for the child that makes the kernel kill it when this process dies; Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_stderr(rank: _Rank) -> None:
    """Show the stderr of `rank` as it arrives; its final message is held back for `_report`."""
    stream = rank.process.stderr
    assert stream is not None

    def pump() -> None:
        for line in stream:
            for mark in (f"[rank{rank.index}]: ", f"[rank {rank.index}] "):  # torch.distributed's and our log's
                line = line.removeprefix(mark)
            if rank.held or line.startswith(_LAST_WORDS):
                rank.held.append(line)
            else:
                _show(rank, line)

    rank.reader = threading.Thread(target=pump, daemon=True)
    rank.reader.start()


def _show(rank: _Rank, line: str) -> None:
    """Write a line of a rank to stderr."""
    sys.stderr.write(f"[rank {rank.index}] {line.rstrip()}\n")


def _first_failure(ranks: list[_Rank]) -> _Rank | None:
    """Wait until a rank fails, and return it; None if all end well."""
    while True:
        codes = [rank.process.poll() for rank in ranks]
        failed = next((rank for rank, code in zip(ranks, codes, strict=True) if code), None)
        if failed or None not in codes:
            return failed
        time.sleep(_POLL_S)


def _exit_code(process: subprocess.Popen[str]) -> int:
    """Return the exit code of an ended process as a shell reports it: 128 + n for signal n."""
    code = process.returncode
    return code if code >= 0 else 128 - code


def _wait(ranks: list[_Rank], seconds: float) -> None:
    """Wait until all ranks have ended, at most `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(rank.process.poll() is None for rank in ranks):
        time.sleep(_POLL_S)


def _cause(failed: _Rank, ranks: list[_Rank]) -> _Rank:
    """Return the rank that caused the end.

    The first one with a code of `_VERDICTS`: it may break other ranks before it has ended itself. Otherwise the first
    one that did not merely lose another rank.
    """
    _wait(ranks, _SETTLE_S)
    ended = [rank for rank in ranks if rank.process.poll()]
    verdicts = [rank for rank in ended if rank.process.returncode in _VERDICTS]
    causes = [rank for rank in (failed, *ended) if rank.process.returncode != RankLost.code]
    return [*verdicts, *causes, failed][0]


def _report(failed: _Rank | None, ranks: list[_Rank]) -> None:
    """Print why the run ends: a named end once (rank 0 has printed its own), otherwise all lines held back."""
    code = failed.process.returncode if failed else 0
    alike = all(rank.process.poll() == code and not rank.held for rank in ranks)  # a verdict of them all
    if failed and code not in _NAMED and not alike:
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        print(f"megabagel: rank {failed.index} ended with {how}; stopping the others", file=sys.stderr)
    for rank in ranks:
        if rank.process.poll() is not None:
            _drain(rank)
        of_all = not failed or code not in _NAMED or rank is failed
        for line in rank.held if of_all else _before_the_end(rank, code):
            _show(rank, line)


def _before_the_end(rank: _Rank, code: int) -> list[str]:
    """Return what a rank printed before its copy of the common message: a worker's traceback, which may be the cause.

    Nothing for a rank that ended otherwise: others broke it.
    """
    ends = [number for number, line in enumerate(rank.held) if line.startswith((ERROR_PREFIX, STOP_PREFIX))]
    return rank.held[: ends[-1]] if ends and rank.process.poll() == code else []


def _stop(ranks: list[_Rank]) -> None:
    """End every running rank and the processes it started; without delay if ranks have given up on a lost one."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
    given_up = any(rank.process.poll() == RankLost.code for rank in ranks)
    _wait(ranks, 0 if given_up else _TERM_S)
    for rank in ranks:
        if rank.process.poll() is None:
            # The whole session: start_new_session made the rank its leader.
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()
        _drain(rank)


def _drain(rank: _Rank) -> None:
    """Wait, for a limited time, for the last lines of an ended rank: a process it left behind may keep stderr open."""
    if rank.reader:
        rank.reader.join(timeout=_DRAIN_S)


@contextmanager
def _forwarding(ranks: list[_Rank]) -> Iterator[None]:
    """Forward signals to the running ranks inside the block."""

    def forward(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    heeded = [number for number in _FORWARDED if number != signal.SIGHUP or not ignored(number)]
    before = {number: signal.signal(number, forward) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
