"""A request to stop: SIGTERM and SIGUSR1 are noted here and heeded between two steps."""

import signal
from types import FrameType, TracebackType
from typing import Any

HEEDED = (signal.SIGTERM, signal.SIGUSR1)
"""Slurm sends SIGTERM when it takes a job's nodes, and some time before what `--signal` names: SIGUSR1 by custom."""


class StopRequest:
    """Notes the first signal that asks this process to stop; later ones change nothing, not even during a save.

    The handlers hold inside the `with` block, in the main thread. Processes that are forked meanwhile inherit them, so
    that a signal to all processes of a job does not end the writer of a checkpoint.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the signal; 0 while there was none."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in HEEDED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.number else handler)  # asked once, it is on its way out

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
