"""What this rank is doing: marks that cost an assignment, read by the thread that tells them to the other ranks."""

import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line marks phases before it needs torch
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
    """The newest mark of this process."""

    step: int = 0
    """Finished steps."""
    phase: str = "start"
    marks: int = 0
    """So far; a rank that is behind the others has fewer."""
    since: float = 0.0
    """Of the monotonic clock, when the phase began."""


now = Progress(since=time.monotonic())


def mark(phase: str, step: int | None = None) -> None:
    """Enter a phase; its name appears in the message when a rank dies or hangs in it."""
    now.phase, now.since = phase, time.monotonic()
    now.marks += 1
    if step is not None:
        now.step = step


def alive() -> None:
    """Within a phase that may be long: it gets on. Not a mark, as ranks do so in different numbers."""
    now.since = time.monotonic()


def all_reduced(found: "Tensor") -> "Tensor":
    """The result of an all-reduce in host memory. On a GPU this waits for the other ranks, and locate say so."""
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
