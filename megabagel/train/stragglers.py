"""Slow ranks: own times of all ranks per step, and a warning that names one that stays behind.

One slow GPU, fan or disk slows the whole job, and no number of the job says so: every rank's step takes equally long.
Compared are ranks of the same pipeline stage, which do the same kind of work.
"""

import logging
import socket
from collections import deque
from statistics import median

from megabagel.config.schema import TelemetryConfig
from megabagel.log import RANK0
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.objects import all_gathered

logger = logging.getLogger(__name__)


def rank_times(seconds: list[float]) -> dict[str, float | int]:
    """Return the own times of a step under their names in metrics.jsonl.

    Args:
        seconds: own time by rank (`runtime.rank_clock`).
    """
    most = max(seconds)
    return {
        "rank_seconds_max": most,
        "rank_seconds_mean": sum(seconds) / len(seconds),
        "slowest_rank": seconds.index(most),
    }


class StragglerWatch:
    """Watch over the ranks' own times; equal on all ranks, rank 0 logs."""

    def __init__(self, config: TelemetryConfig, mesh: Mesh) -> None:
        """Gather stage and host of every rank. Collective."""
        self._ratio, self._steps = config.straggler_ratio, config.straggler_steps
        self._places: list[tuple[int, str]] = [
            (stage, host) for stage, host in all_gathered([mesh.pp.rank, socket.gethostname()])
        ]
        self._past: deque[list[float]] = deque(maxlen=self._steps)

    def add(self, step: int, seconds: list[float]) -> None:
        """Add a step. After `telemetry.straggler_steps` steps name the slow ranks, and begin anew.

        A mean over many steps, because packs differ in work from rank to rank, but not always to the same rank's cost.

        Args:
            step: finished steps.
            seconds: own time by rank.
        """
        self._past.append(seconds)
        if self._steps and len(self._past) == self._steps:
            means = [sum(times) / len(self._past) for times in zip(*self._past, strict=True)]
            self._past.clear()
            for rank, usual in self._slow(means):
                logger.warning(
                    "steps %d to %d: rank %d on %s is slow, %.3f s a step of its own where the median of its pipeline "
                    "stage is %.3f s; tensor- and context-parallel ranks wait for each other, so the cause may be any "
                    "of its group",
                    *(step - self._steps + 1, step, rank, self._places[rank][1], means[rank], usual),
                    extra=RANK0,
                )

    def _slow(self, means: list[float]) -> list[tuple[int, float]]:
        """Return (rank, median of the others of its stage) of every slow rank."""
        slow = []
        for rank, (stage, _) in enumerate(self._places):
            others = [mean for other, mean in enumerate(means) if other != rank and self._places[other][0] == stage]
            if others and means[rank] > self._ratio * median(others):
                slow.append((rank, median(others)))
        return slow
