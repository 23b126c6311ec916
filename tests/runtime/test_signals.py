"""A request to stop is noted once; a time limit that is too short for a step is named while the step is under way."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabagel.runtime import phase
from megabagel.runtime.signals import StopRequest

HEEDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_forward() -> Iterator[None]:
    """A phase for the messages to name; handlers are as before, after tests that leave signals ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have been started by nohup
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
    assert [signal.getsignal(number) for number in HEEDED] == [signal.SIG_IGN] * 3  # it is on its way out


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


def run(code: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)


@pytest.mark.parametrize("number", HEEDED)
def test_a_signal_before_anything_is_imported_is_heeded(number: signal.Signals) -> None:
    """Not the end of a run by the signal (143): it waits until there is a handler."""
    code = f"""
import os, signal, sys
import megabagel.__main__ as program
assert "megabagel.cli" not in sys.modules
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import megabagel.cli
def command():
    os.kill(os.getpid(), {int(number)})
    from megabagel.runtime.signals import StopRequest
    with StopRequest() as stop:
        print("heeded", int(stop.number))
    return 75
megabagel.cli.main = command
sys.argv = ["megabagel", "train", "x.yaml"]
sys.exit(program.main())
"""
    done = run(code)
    assert (done.returncode, done.stdout) == (75, f"heeded {int(number)}\n"), done


def test_what_is_held_is_what_is_heeded() -> None:
    from megabagel import __main__
    from megabagel.runtime import signals

    assert __main__.HELD == signals.HEEDED


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        send(signal.SIGHUP)
        assert stop.number == 0


def test_a_terminal_that_is_gone_does_not_end_a_run_with_an_error() -> None:
    """Its descriptors stay open, and every write fails with EIO; a pipe is left alone."""
    code = """
import os, pty, signal, sys
from megabagel.runtime.signals import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_DFL)
main, terminal = pty.openpty()
os.dup2(terminal, 1)
os.close(main)
with StopRequest() as stop:
    stop.finished = 1
    os.kill(os.getpid(), signal.SIGHUP)
    os.write(1, b"into nothing")
    os.write(2, b"still here")
    sys.exit(75 if stop.number == signal.SIGHUP else 1)
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (75, "still here"), done
