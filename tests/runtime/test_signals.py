"""A request to stop is noted once; a time limit that is too short for a step is named while the step is under way."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from megabagel.runtime import phase
from megabagel.runtime.signals import StopRequest

HEEDED = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def in_forward() -> Iterator[None]:
    """A phase for the messages to name; handlers are as before, after tests that leave signals ignored."""
    before, handlers = phase.now.step, [signal.getsignal(number) for number in HEEDED]
    phase.finished(12)
    with phase.phase("forward"):
        yield
    phase.finished(before)
    for number, handler in zip(HEEDED, handlers, strict=True):
        signal.signal(number, handler)


def told(caplog: pytest.LogCaptureFixture, lines: int) -> list[str]:
    """What was said, once that are so many lines, or after a while."""
    end = time.monotonic() + 10
    while len(caplog.messages) < lines and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.05)  # for a line too many
    return caplog.messages


def send(*numbers: signal.Signals) -> None:
    """To this process, as the launcher does; a thread reads each before the next comes."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)


def test_the_first_signal_counts() -> None:
    with StopRequest() as stop:
        assert stop.number == 0
        send(signal.SIGUSR1, signal.SIGTERM)
        assert stop.number == signal.SIGUSR1
    assert [signal.getsignal(number) for number in HEEDED] == [signal.SIG_IGN] * 2  # it is on its way out


@pytest.mark.parametrize(
    ("signals", "finished", "says"),
    [
        ([signal.SIGUSR1], 3, []),
        ([signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM], 3, []),
        ([signal.SIGUSR1], 0, ["before the first step is finished"]),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 3, ["still in phase forward after step 12"]),
        ([signal.SIGUSR1, signal.SIGTERM], 0, ["before the first step", "shorter than a start and a step"]),
    ],
)
def test_what_is_said(
    signals: list[signal.Signals], finished: int, says: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with StopRequest() as stop:
        stop.finished = finished
        send(*signals)
        lines = told(caplog, len(says))
    assert len(lines) == len(says)
    for line, words in zip(lines, says, strict=True):
        assert words in line
        assert "sbatch --time" in line or "--signal=B:USR1@S" in line


def test_a_main_thread_that_is_stuck_keeps_nobody_from_saying_so(caplog: pytest.LogCaptureFixture) -> None:
    """Handlers of Python wait for the end of a call into C, the thread does not."""
    with StopRequest():
        child = os.fork()
        if child == 0:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                time.sleep(0.2)
                os.kill(os.getppid(), number)
            os._exit(0)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 6_000_000)  # seconds
        over = time.time()
        os.waitpid(child, 0)
        assert len(told(caplog, 2)) == 2
    assert all(record.created < over for record in caplog.records)
