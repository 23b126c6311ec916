"""Time by phase, when phases lie inside each other: every second counts for the innermost one."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds by phase; `settle` is called at every border, so that work in flight counts where it was started.

    Phases may change threads (autograd's backward runs in its own), but only one of them computes at a time.
    """

    def __init__(self, settle: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._settle, self._clock = settle, clock
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`, except that of phases inside it."""
        self._border()
        self._open.append(name)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def _border(self) -> None:
        self._settle()
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
