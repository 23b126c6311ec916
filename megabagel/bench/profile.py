"""A trace for Perfetto or chrome://tracing, and a snapshot of memory, of a few steps on rank 0."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megabagel.errors import UserError
from megabagel.runtime.device import current_device

TRACE, CUDA_MEMORY, CPU_MEMORY = "trace.json", "memory.pickle", "memory.json"
MOST = 40
"""Operators named in the memory table of a CPU."""


@contextmanager
def profiled(folder: str, *, first: bool) -> Iterator[None]:
    """Profile what runs inside; rank 0 writes into `folder`.

    trace.json: operators and kernels by time. memory.pickle (GPU): torch's allocator snapshot, for
    pytorch.org/memory_viz. memory.json (CPU): which operators took most memory. Raises UserError when the disk refuses.
    """
    if not first:
        yield
        return
    cuda = current_device().type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.memory._record_memory_history()  # torch's only interface to the snapshot
    with profile(activities=activities, profile_memory=True) as found:
        yield
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(target / TRACE))
        if cuda:
            torch.cuda.memory._dump_snapshot(str(target / CUDA_MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            (target / CPU_MEMORY).write_text(json.dumps(_by_operator(found), indent=1) + "\n")
    except (OSError, RuntimeError) as error:
        raise UserError(f"{target}: the profile cannot be written ({error}); choose another --out") from error


def _by_operator(found: profile) -> list[dict[str, object]]:
    """Bytes that operators allocated themselves, the largest first."""
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_memory_usage)
    return [{"operator": row.key, "calls": row.count, "bytes": row.self_cpu_memory_usage} for row in rows[:MOST]]
