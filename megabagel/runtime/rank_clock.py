"""Clock of this rank's own part of a step, without its waits for other ranks.

Wall times of a step are equal on all ranks, because each waits for the slowest. A rank's own time runs from the start
of the step until its gradients are ready to be reduced, less the waits for neighbouring pipeline stages. Tensor- and
context-parallel ranks wait for each other inside their layers, so a slow rank slows its whole group: own times tell
groups apart, not the ranks within one.

On a GPU the marks are events in its stream: the host only launches work, and its times say little.
"""

import time

import torch

Mark = float | torch.cuda.Event
"""A moment: seconds on a CPU, an event in the current stream on a GPU."""


class RankClock:
    """Clock of one step at a time. A mark costs a microsecond."""

    def __init__(self) -> None:
        self._marks: list[Mark] = []

    def start(self) -> None:
        """Begin a step."""
        self._marks = [_mark()]

    def pause(self) -> None:
        """Begin a wait for other ranks, or end the rank's part of the step."""
        # Even numbers of marks: the clock stands still, or no step has begun (evaluation, sampling).
        if len(self._marks) % 2:
            self._marks.append(_mark())

    def go_on(self) -> None:
        """End a wait for other ranks."""
        if self._marks and not len(self._marks) % 2:
            self._marks.append(_mark())

    def seconds(self) -> float:
        """Return the seconds of the step and end it. On a GPU its stream has to be past the last mark."""
        self.pause()
        marks, self._marks = self._marks, []
        return sum(map(_between, marks[::2], marks[1::2]))


clock = RankClock()
"""The clock of this process."""


def _mark() -> Mark:
    """Return this moment."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Mark, stop: Mark) -> float:
    """Return the seconds between two marks."""
    if isinstance(start, float):
        assert isinstance(stop, float)
        return stop - start
    assert not isinstance(stop, float)
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
