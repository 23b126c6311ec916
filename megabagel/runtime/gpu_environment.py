"""Environment variables that GPU libraries read at start, with the value that training wants and the reason.

`megabagel train` sets those that the user has not set, before torch is imported and a CUDA context exists. A site's own
value always wins; `megabagel doctor` names one that spoils performance.
"""

import os
import stat
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megabagel.config.schema import ParallelConfig


@dataclass(frozen=True)
class Variable:
    """One variable."""

    name: str
    value: Callable[[ParallelConfig], str | None]
    """Wanted value of a grid; None: leave it unset."""
    reason: str
    known: tuple[str, ...] = ()
    """Older or newer names of the same setting, which count as set."""


def _node_local(_: ParallelConfig) -> str | None:
    """A folder of this user's alone: Triton loads code from it, so one that somebody else made is not used."""
    folder = Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022
    return str(folder) if own else None


VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        # On Blackwell it is not needed, and more queues are faster there; asking for the device here would create the
        # context that the variable has to precede, so the rule is the grid alone.
        lambda grid: "1" if grid.tp > 1 else None,
        "with one hardware queue a tensor-parallel collective starts before the GEMM that it should hide behind",
    ),
    Variable(
        "PYTORCH_ALLOC_CONF",
        lambda grid: "expandable_segments:True",
        "the border between understanding and generation rows moves with every pack, so nearly all sizes are new, and "
        "fixed segments fragment",
        known=("PYTORCH_CUDA_ALLOC_CONF",),
    ),
    Variable(
        "TRITON_CACHE_DIR",
        _node_local,
        "thousands of ranks that compile into one network folder wait for each other",
    ),
    Variable(
        "TORCH_FR_BUFFER_SIZE",
        lambda grid: "2000",
        "NCCL's flight recorder: the last collectives of every rank, when one hangs",
        known=("TORCH_NCCL_TRACE_BUFFER_SIZE",),
    ),
    Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", lambda grid: "1", "writes the flight recorder's content when one hangs"),
)


def missing(grid: ParallelConfig, env: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that training on `grid` sets, because the user has not, with their values."""
    found = {}
    for variable in VARIABLES:
        value = variable.value(grid)
        if value is not None and not any(name in env for name in (variable.name, *variable.known)):
            found[variable.name] = value
    return found


def prepare(grid: ParallelConfig, env: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Set what is `missing`; call it before torch is imported. Returns what was set."""
    found = missing(grid, env)
    env.update(found)
    return found


def spoilers(env: Mapping[str, str] = os.environ) -> list[str]:
    """Return a line for each variable whose value costs speed on a GPU, with the remedy."""
    found = []
    if env.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        found.append("CUDA_LAUNCH_BLOCKING: every kernel is waited for; unset it outside of debugging")
    if env.get("TORCH_NCCL_BLOCKING_WAIT", "0") not in ("", "0"):
        found.append("TORCH_NCCL_BLOCKING_WAIT: the host waits for every collective; unset it")
    if env.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        found.append("NCCL_P2P_DISABLE: GPUs of a node exchange through host memory; unset it")
    if env.get("NCCL_DEBUG", "").upper() in ("TRACE", "INFO"):
        found.append("NCCL_DEBUG: a line per collective and rank; WARN is enough")
    if env.get("TRITON_INTERPRET", "0") not in ("", "0"):
        found.append("TRITON_INTERPRET: kernels run in Python; unset it on a GPU")
    return found
