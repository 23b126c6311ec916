"""Stop requests: SIGTERM, SIGHUP and SIGUSR1 are recorded by a handler and acted on between two steps."""

import errno
import logging
import os
import signal
import termios
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from megabagel.runtime import phase

HEEDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Slurm sends SIGTERM when it takes a job's nodes, and before that the signal of `--signal`, by custom SIGUSR1.
SIGHUP comes when the run's terminal is closed."""

logger = logging.getLogger(__name__)


def ignored(number: int) -> bool:
    """Whether a signal was ignored from outside, as nohup does with SIGHUP; this must stay so."""
    return signal.getsignal(number) is signal.SIG_IGN


def leave_terminal() -> None:
    """Redirect output to /dev/null if its terminal is gone: every write to it would fail with EIO."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


class StopRequest:
    """Recorder of the first signal that asks this process to stop; later ones change nothing, not even during a save.

    The handlers are installed inside the `with` block, in the main thread. A signal to all processes of a job
    interrupts no save: a checkpoint is written by a thread of this process, and data workers ignore these signals.

    A second thread reports a time limit that is too short: the main thread runs signal handlers late while it waits for
    a device or for other ranks, and Slurm may have killed it by then.
    """

    def __init__(self) -> None:
        self.number = 0
        """Number of the first signal; 0 before one came."""
        self.finished = 0
        """Steps finished since the start; the training loop counts them."""
        self._before: dict[signal.Signals, Any] = {}
        self._began = time.monotonic()

    def __enter__(self) -> "StopRequest":
        heeded = [number for number in HEEDED if number != signal.SIGHUP or not ignored(number)]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._wakeup = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(reads,), daemon=True)
        self._listener.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)  # what came since __main__ held them back comes now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writes)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.number else handler)  # asked once, it is on its way out

    def _note(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: record the first signal."""
        if number == signal.SIGHUP:
            leave_terminal()
        self.number = self.number or number

    def _listen(self, reads: int) -> None:
        """Read signal numbers from the wake-up pipe until it is closed."""
        first, came, named = 0, 0.0, False
        while number := int.from_bytes(os.read(reads, 1)):
            if number not in HEEDED:
                continue
            now = time.monotonic()
            if not first:
                first, came = number, now
                if not self.finished:
                    logger.warning("%s", self._early(number, now))
            elif number == signal.SIGTERM and first != number and not named:  # Slurm's, at the limit itself
                named = True
                logger.error("%s", self._late(first, now - came, now))
        os.close(reads)

    def _early(self, number: int, now: float) -> str:
        return (
            f"{signal.Signals(number).name} {now - self._began:.0f} s after the start, in phase {phase.now.phase}, "
            "before the first step is finished: it is finished and saved, then the run stops. Where a time limit is "
            "near, it is hardly longer than a start and a step: give it more (sbatch --time)"
        )

    def _late(self, first: int, seconds: float, now: float) -> str:
        came = f"SIGTERM {seconds:.0f} s after {signal.Signals(first).name}, still in phase {phase.now.phase}"
        ends = "Where this is the time limit, Slurm ends the job now"
        if not self.finished:
            return (
                f"{came}, with no step finished {now - self._began:.0f} s after the start. {ends}, and no start will "
                "get further: the limit is shorter than a start and a step; give it more (sbatch --time)"
            )
        return (
            f"{came} after step {phase.now.step}. {ends}, and the next start goes on from the checkpoint before: "
            f"have the signal sent earlier (sbatch --signal=B:USR1@S, S above {seconds:.0f} by what a step and a "
            "checkpoint take)"
        )
