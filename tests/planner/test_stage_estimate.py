"""A whole stage of training: days, the interval between checkpoints, disk."""

import math
from dataclasses import replace
from typing import Any

import pytest

from megabagel.planner import report
from megabagel.planner.estimate import Estimate, Planner
from megabagel.planner.hardware import CATALOG
from megabagel.planner.stage_estimate import GPU_HOURS_BETWEEN_FAILURES, campaign, most_checkpoints
from tests.planner.test_planner import grid, recipe


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(recipe(), CATALOG["h200"])


@pytest.mark.parametrize("beside", [True, False])
def test_stage_of_training(planner: Planner, beside: bool) -> None:
    """Young and Daly by hand: what training waits for is the copy to host memory, or the whole write."""
    estimate = saving(planner.estimate(grid(4, 1, 1, 256 // 4)), async_save=beside)
    plan = campaign(estimate)
    between = GPU_HOURS_BETWEEN_FAILURES * 3600 / 256
    pause = plan.checkpoint_gib * 2**30 / 256 / 20e9 if beside else plan.checkpoint_seconds
    interval = math.sqrt(2 * pause * between) - pause
    assert plan.interval_steps == round(interval / estimate.time.seconds)
    assert ("beside the next steps" if beside else "while training waits") in report.stage(estimate)
    assert plan.tokens == pytest.approx(2.5e12, rel=0.06)  # BAGEL table 3
    assert plan.days > 200_000 * estimate.time.seconds / 86400


def saving(estimate: Estimate, **changes: Any) -> Estimate:
    """The estimate of a run with other settings of checkpoints."""
    config = estimate.case.config
    config = replace(config, checkpoint=replace(config.checkpoint, **changes))
    return replace(estimate, case=replace(estimate.case, config=config))


def test_a_checkpoint_is_written_before_the_next_begins(planner: Planner) -> None:
    """At a megabyte per second it takes longer than the interval that would lose the least."""
    estimate = planner.estimate(grid(4, 1, 1, 16))
    slow = replace(estimate, case=replace(estimate.case, gpu=replace(CATALOG["h200"], storage_gb_s=0.001)))
    plan = campaign(slow)
    assert plan.interval_steps == round(plan.checkpoint_seconds / estimate.time.seconds)


@pytest.mark.parametrize(
    ("steps", "every", "keep", "keep_every", "most"),
    [
        (100, 10, 3, 0, 4),  # 70 80 90, and 100 on its way
        (100, 0, 3, 0, 1),
        (100, 60, 3, 0, 2),
        (100, 10, 0, 0, 10),  # all of them
        (95, 10, 0, 0, 10),  # the last step has one of its own
        (100, 10, 2, 30, 5),  # 30 60, 80 90, and 100; 90 is one of the newest
        (100, 10, 1, 20, 6),
    ],
)
def test_checkpoints_on_the_disk(steps: int, every: int, keep: int, keep_every: int, most: int) -> None:
    settings = (f"train.steps={steps}", "train.warmup=0", f"checkpoint.every={every}", f"checkpoint.keep={keep}")
    assert most_checkpoints(recipe(*settings, f"checkpoint.keep_every={keep_every}")) == most
