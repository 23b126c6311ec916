"""Phases of a run: one context manager feeds the heartbeat, profiler ranges and the stopwatch of `megabagel bench`.

    with phase("forward"):
        outputs = model(inputs)

The phase a rank is in appears in the message when a rank dies or hangs (`heartbeat`). While torch's profiler runs, a
phase is a `record_function` range; under `nsys profile` it is an NVTX range. Other listeners open a range of their own.

Measured on a busy core of an AMD EPYC: 1.0 us per phase while nobody listens, 90 us while torch's profiler runs.
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

if TYPE_CHECKING:  # the command line handles signals, which name phases, before it needs torch
    from torch import Tensor

_PACKAGE = Path(__file__).parents[1]
_OWN = "runtime/phase.py"
_COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "pipeline_parallel/p2p_communication.py",
    "core/optimizer/clip_grads.py",
    _OWN,
)
"""Files whose functions are named after what they wait for."""
_SEVERAL = "coalescing_manager"
"""In torch.distributed: several collectives as one; who started them has the better name."""
_BETWEEN = ("runtime/cpu_backend.py", "runtime/device.py", _OWN)
"""Our files on the way to a collective."""


@dataclass
class Progress:
    """Where this process is in the run."""

    step: int = 0
    """Finished steps."""
    phase: str = "start"
    """The innermost one."""
    marks: int = 0
    """Counted phases entered so far; a rank that is behind the others has fewer."""
    since: float = 0.0
    """Of the monotonic clock, when a phase last began or ended."""


now = Progress(since=time.monotonic())

Listener = Callable[[str], AbstractContextManager[object]]
"""Opens a range for a phase by its name; its exit closes the range."""

listeners: list[Listener] = []
"""Called for every phase. Empty in training: see `_ranges` for profilers."""


class phase:
    """One phase of the run; phases may lie inside each other.

    A class rather than a generator with `contextmanager`, which takes 1.7 us instead of 1.0.

    Args:
        name: appears in messages, profiles and reports.
        counted: False for a phase that some ranks enter more often than others in the same step, such as encoding
            images on the first pipeline stage. It is shown, but does not count as progress beyond that of other ranks.
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
            error.megabagel_phase = self._name  # type: ignore[attr-defined] # for `phase_of`, when all phases are left
        now.phase, now.since = self._before, time.monotonic()


def _ranges(name: str) -> ExitStack | None:
    """The ranges of a phase, opened; None while nobody listens.

    torch is looked up rather than imported: before it is loaded no profiler can run.
    """
    torch = sys.modules.get("torch")
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
"""Whether `nsys profile` started this process, which sets this variable. Under `torch.autograd.profiler.emit_nvtx`, the
other way to NVTX ranges, `record_function` makes them."""


def reset() -> None:
    """Start anew, for a process that runs one job after another."""
    now.step, now.phase, now.since = 0, "start", time.monotonic()


def finished(step: int) -> None:
    """Set the number of finished steps."""
    now.step = step


def phase_of(error: BaseException) -> str:
    """Name of the innermost phase that `error` was raised in."""
    return getattr(error, "megabagel_phase", now.phase)


def keepalive() -> None:
    """Progress within a phase that may be long. Not counted, as ranks make it in different numbers."""
    now.since = time.monotonic()


def all_reduced(found: "Tensor") -> "Tensor":
    """The result of an all-reduce in host memory.

    A function of its own because on a GPU the copy is what waits for the other ranks: `locate` finds its name on
    the stack and reports an all-reduce.
    """
    return found.cpu()


Location = tuple[str | None, str]
"""(collective that is waited in, or None; innermost line of ours that is executed)."""


def locate() -> Location:
    """Where the main thread is, found on its stack, so that nothing has to be announced.

    On a GPU a collective is only launched by its call: what is found then is `all_reduced`, or else the line that waits
    for the device.
    """
    return _locate(_outwards(sys._current_frames().get(threading.main_thread().ident or 0)))


def origin(error: BaseException) -> Location:
    """Where an error came from."""
    return _locate(reversed(list(traceback.walk_tb(error.__traceback__))))


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _locate(frames: Iterable[tuple[FrameType, int]]) -> Location:
    """Look at frames and their lines, the innermost first."""
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
