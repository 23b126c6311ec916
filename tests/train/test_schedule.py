"""The learning rate at points worked out by hand from the formula (docs/bagel.md#learning-rate)."""

import math

import pytest

from megabagel.config.schema import TrainConfig
from megabagel.train.schedule import learning_rate

CONSTANT = TrainConfig(steps=50, lr=0.4, warmup=8, schedule="constant")
COSINE = TrainConfig(steps=108, lr=0.4, min_lr=0.1, warmup=8, schedule="cosine")


@pytest.mark.parametrize("config", [CONSTANT, COSINE])
def test_warm_up_is_a_straight_line_from_zero(config: TrainConfig) -> None:
    assert learning_rate(config, 0) == 0.0
    assert [learning_rate(config, step) for step in (1, 2, 4, 6)] == [0.05, 0.1, 0.2, pytest.approx(0.3)]
    assert learning_rate(config, 7) == pytest.approx(0.35)
    assert learning_rate(config, 8) == pytest.approx(0.4)


def test_constant_stays() -> None:
    assert {learning_rate(CONSTANT, step) for step in (8, 9, 49, 1000)} == {0.4}


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (9, 0.25 + 0.15 * math.cos(math.pi / 100)),
        (33, 0.25 + 0.15 * math.sqrt(0.5)),  # a quarter of the 100 steps
        (58, 0.25),  # half way: the mean of lr and min_lr
        (83, 0.25 - 0.15 * math.sqrt(0.5)),
        (107, 0.25 - 0.15 * math.cos(math.pi / 100)),
        (108, 0.1),
        (1000, 0.1),  # a run that was told to go on
    ],
)
def test_cosine_falls_to_its_floor(step: int, rate: float) -> None:
    assert learning_rate(COSINE, step) == pytest.approx(rate, rel=1e-12)


def test_cosine_without_a_floor_and_its_reference_value() -> None:
    """min_lr / lr = 1e-3 at three quarters: 0.5 (1 - sqrt(1/2)) (1 - 1e-3) + 1e-3 = 0.1473001628."""
    assert learning_rate(TrainConfig(steps=100, lr=1.0, min_lr=0.0, warmup=0, schedule="cosine"), 100) == 0.0
    config = TrainConfig(steps=100, lr=1e-4, min_lr=1e-7, warmup=0, schedule="cosine")
    assert learning_rate(config, 75) == pytest.approx(1.473001628e-5, rel=1e-9, abs=0)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warm_up_the_first_step_runs_at_full_rate(schedule: str) -> None:
    assert learning_rate(TrainConfig(steps=10, lr=0.4, warmup=0, schedule=schedule), 0) == pytest.approx(0.4)


def test_a_warm_up_longer_than_the_run_never_ends() -> None:
    assert learning_rate(TrainConfig(steps=10, lr=0.4, warmup=100), 9) == pytest.approx(0.036)
