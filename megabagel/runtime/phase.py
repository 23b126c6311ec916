"""Phases of a run: one context manager feeds heartbeat, profiler ranges and the stopwatch of `megabagel bench`.

    with phase("forward"):
        outputs = model(inputs)

The current phase appears in the message when a rank dies or hangs (`heartbeat.py`). While torch's profiler runs, a
phase is a `record_function` range; under `nsys profile` it is an NVTX range. `listeners` may open ranges of their own.

Measured on a busy core of an AMD EPYC: 1.0 us per phase without listeners, 90 us while torch's profiler runs.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

# Not imported at run time: the command line handles signals, whose messages name phases, before it loads torch.
if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = Path(__file__).parents[1]
_OWN = "runtime/phase.py"
_COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "pipeline_parallel/p2p_communication.py",
    "core/optimizer/clip_grads.py",
    _OWN,
)
"""Files whose functions have the name of the collective that they wait for."""
_SEVERAL = "coalescing_manager"
"""torch.distributed's function that runs several collectives as one; its caller's name is more informative."""
_BETWEEN = ("runtime/cpu_backend.py", "runtime/device.py", "runtime/collective_errors.py", "runtime/objects.py", _OWN)
"""Files of this package that lie on the stack between a caller and a collective."""


@dataclass
class Progress:
    """Position of this process in the run."""

    step: int = 0
    """Finished steps."""
    phase: str = "start"
    """Innermost phase."""
    marks: int = 0
    """Number of counted phases entered; a rank that is behind has fewer."""
    since: float = 0.0
    """Monotonic time at which a phase last began or ended, seconds."""


now = Progress(since=time.monotonic())

Listener = Callable[[str], AbstractContextManager[object]]
"""Opens a range for a phase, given its name; leaving the context closes the range."""

listeners: list[Listener] = []
"""Called for every phase. Empty in training: see `_ranges` for profilers."""


class phase:
    """Context manager of one phase of the run; phases may be nested.

    A class rather than a generator with `contextmanager`, which takes 1.7 us instead of 1.0.

    Args:
        name: shown in messages, profiles and reports.
        counted: False for a phase that some ranks enter more often than others within a step, such as encoding images
            on the first pipeline stage. It is shown, but not counted as progress in `Progress.marks`.
    """

    __slots__ = ("_before", "_counted", "_name", "_open")

    def __init__(self, name: str, *, counted: bool = True) -> None:
        self._name, self._counted = name, counted

    def __enter__(self) -> None:
        self._before, now.phase, now.since = now.phase, self._name, time.monotonic()
        now.marks += self._counted
        self._open = _ranges(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.__exit__(kind, error, trace)
        if error is not None and not hasattr(error, "megabagel_phase"):
            # For `phase_of`: when the error is reported, all phases have been left.
            error.megabagel_phase = self._name  # type: ignore[attr-defined]
        now.phase, now.since = self._before, time.monotonic()


def _ranges(name: str) -> ExitStack | None:
    """Open the ranges of a phase; returns None if nothing listens.

    torch is looked up in `sys.modules` rather than imported: before it is loaded no profiler can run.
    """
    torch = sys.modules.get("torch")
    # A private of torch: whether a profiler is running.
    profiled = torch is not None and torch.autograd._profiler_enabled()
    if not profiled and not listeners and not _NSYS:
        return None
    stack = ExitStack()
    for listener in listeners:
        stack.enter_context(listener(name))
    if torch is not None and profiled:
        stack.enter_context(torch.profiler.record_function(name))
    if torch is not None and _NSYS and torch.cuda.is_available():
        stack.enter_context(torch.cuda.nvtx.range(name))
    return stack


_NSYS = "NSYS_PROFILING_SESSION_ID" in os.environ
"""Whether `nsys profile` started this process; it sets this variable. Under `torch.autograd.profiler.emit_nvtx`, the
other source of NVTX ranges, `record_function` makes them."""


def reset() -> None:
    """Reset the position, for a process that runs several jobs in turn."""
    now.step, now.phase, now.since = 0, "start", time.monotonic()


def finished(step: int) -> None:
    """Set the number of finished steps."""
    now.step = step


def phase_of(error: BaseException) -> str:
    """Return the innermost phase in which `error` was raised."""
    return getattr(error, "megabagel_phase", now.phase)


def keepalive() -> None:
    """Report progress within a long phase. Not counted in `marks`: ranks call it different numbers of times."""
    now.since = time.monotonic()


def all_reduced(found: "Tensor") -> "Tensor":
    """Copy the result of an all-reduce to host memory.

    A function of its own because on a GPU this copy is where a rank waits for the others: `locate` finds its name on
    the stack and reports an all-reduce.
    """
    return found.cpu()


Location = tuple[str | None, str]
"""(collective that the thread waits in, or None; innermost line of this package)."""


def locate() -> Location:
    """Return the location of the main thread, read from its stack: no call has to announce a collective.

    On a GPU a call only launches its collective. The location is then `all_reduced`, or the line that waits for the
    device.
    """
    return _locate(_outwards(sys._current_frames().get(threading.main_thread().ident or 0)))


def origin(error: BaseException) -> Location:
    """Return the location at which an error was raised."""
    return _locate(reversed(list(traceback.walk_tb(error.__traceback__))))


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of a stack with their lines, innermost first."""
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _locate(frames: Iterable[tuple[FrameType, int]]) -> Location:
    """Return the location from frames and their lines, innermost first."""
    collective = None
    for frame, line in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(str(_PACKAGE)) and not file.endswith(_BETWEEN):
            return collective, f"{Path(file).relative_to(_PACKAGE.parent)}:{line} {name}"
        if collective is None and file.endswith(_COLLECTIVES):
            collective = name.strip("_")
        elif collective == _SEVERAL and "megatron" in file:
            collective = name
    return collective, "outside megabagel"
