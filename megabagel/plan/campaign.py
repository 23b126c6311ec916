"""A whole stage of training: days, energy, checkpoints.

The interval between checkpoints is Young's, with Daly's first correction (Daly, A higher order estimate of the
optimum checkpoint interval, equation 20): tau = sqrt(2 C M) - C, where C is the time that a checkpoint takes and M
the mean time between failures of the job.
"""

import math
from dataclasses import dataclass

from megabagel.plan.estimate import Estimate
from megabagel.plan.memory import checkpoint_bytes, host_memory

GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419
"""One unexpected interruption in so many GPU hours: 419 in 54 days on 16,384 H100 (Llama 3, section 3.3.4)."""
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
    interval_steps: int
    """Steps between checkpoints that lose the least time."""
    kept_gib: float
    """Disk that the run holds at most: checkpoint.keep of them, and the one being written."""
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
    between = GPU_HOURS_BETWEEN_FAILURES * 3600 / gpus
    interval = max(step, math.sqrt(2 * write * between) - write)
    # Each failure loses half an interval and a restart; each interval ends in a checkpoint.
    lost = write / interval + (interval / 2 + RESTART) / between
    seconds = config.train.steps * step * (1 + lost)
    host = host_memory(case)
    return Campaign(
        tokens=config.train.steps * config.train.packs_per_step * estimate.workload.tokens,
        days=seconds / 86400,
        megawatt_hours=seconds / 3600 * gpus * case.gpu.server_watt / 1e6,
        checkpoint_gib=size / 2**30,
        checkpoint_seconds=write,
        interval_steps=max(1, round(interval / step)),
        kept_gib=size / 2**30 * (max(config.checkpoint.keep, 1) + 1),
        host_gib=host / 2**30,
        host_enough=host / 2**30 <= case.gpu.host_gib,
    )
