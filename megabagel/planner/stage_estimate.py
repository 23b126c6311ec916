"""Estimate of a whole training stage: days, energy, checkpoints.

The interval between checkpoints is Young's, with Daly's first correction (Daly, A higher order estimate of the
optimum checkpoint interval, equation 20): tau = sqrt(2 C M) - C, where C is the time that a checkpoint takes from
training and M the mean time between failures of the job. With `checkpoint.async_save` C is the copy to host memory
alone, but the next checkpoint cannot begin before this one is written.
"""

import math
from dataclasses import dataclass

from megabagel.config.schema import Config
from megabagel.planner.estimate import Estimate
from megabagel.planner.memory import checkpoint_bytes, host_memory

GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419
"""One unexpected interruption in so many GPU hours: 419 in 54 days on 16,384 H100 (Llama 3, section 3.3.4)."""
COPY_GB_S = 20.0
"""From a GPU to its host's memory, 10^9 bytes per second: PCIe, pinned memory. An assumption."""
RESTART = 600.0
"""Seconds from a failure to the first new step: scheduling, start, loading. An assumption."""


@dataclass(frozen=True)
class Campaign:
    """The stage from its first to its last step."""

    tokens: float
    days: float
    """With time for checkpoints, and for failures at the rate above."""
    megawatt_hours: float
    checkpoint_gib: float
    checkpoint_seconds: float
    """To write one."""
    pause_seconds: float
    """That training waits for it."""
    interval_steps: int
    """Steps between checkpoints that lose the least time."""
    kept_gib: float
    """Disk that the run holds at most, by checkpoint.every, keep and keep_every, the one being written included."""
    host_gib: float
    """Per GPU."""
    host_enough: bool


def campaign(estimate: Estimate) -> Campaign:
    """The stage that the config describes, at an estimate's speed."""
    case, step = estimate.case, estimate.time.seconds
    config, gpus = case.config, case.grid.gpus
    size = checkpoint_bytes(case)
    nodes = math.ceil(gpus / case.gpu.gpus_per_node)
    write = size / (nodes * case.gpu.storage_gb_s * 1e9)
    beside = config.checkpoint.async_save
    pause = size / gpus / (COPY_GB_S * 1e9) if beside else write
    between = GPU_HOURS_BETWEEN_FAILURES * 3600 / gpus
    interval = max(step, write if beside else 0.0, math.sqrt(2 * pause * between) - pause)
    # Each interval pauses for a checkpoint; each failure loses half an interval, a restart, and what was done while the
    # newest checkpoint was not whole yet.
    lost = pause / interval + (interval / 2 + RESTART + write * beside) / between
    seconds = config.train.steps * step * (1 + lost)
    host = host_memory(case)
    return Campaign(
        tokens=config.train.steps * config.train.packs_per_step * estimate.workload.tokens,
        days=seconds / 86400,
        megawatt_hours=seconds / 3600 * gpus * case.gpu.server_watt / 1e6,
        checkpoint_gib=size / 2**30,
        checkpoint_seconds=write,
        pause_seconds=pause,
        interval_steps=max(1, round(interval / step)),
        kept_gib=size / 2**30 * most_checkpoints(config),
        host_gib=host / 2**30,
        host_enough=host / 2**30 <= case.gpu.host_gib,
    )


def most_checkpoints(config: Config) -> int:
    """Checkpoints that a run has on disk at most, which is while it writes the one after its last step."""
    about, steps = config.checkpoint, config.train.steps
    earlier = range(about.every, steps, about.every) if about.every else range(0)
    if not about.keep:
        return len(earlier) + 1
    for_good = [step for step in earlier[: -about.keep] if about.keep_every and step % about.keep_every == 0]
    return len(for_good) + min(about.keep, len(earlier)) + 1
