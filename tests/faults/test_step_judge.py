"""Which steps are faulty, by hand-made losses and norms."""

import json
import math
import statistics

import pytest

from megabagel.config.schema import TrainConfig
from megabagel.train.judge import Fault, StepJudge

CONFIG = TrainConfig(on_nonfinite="skip", on_spike="rollback", spike_sigma=3.0, spike_window=4)
CALM = [(2.0, 1.0), (2.2, 1.2), (1.8, 0.8), (2.0, 1.0)]
"""Mean and deviation of the losses are 2 and sqrt(0.02), of the norms 1 and sqrt(0.02)."""
DEVIATION = math.sqrt(0.02)


def calm(config: TrainConfig = CONFIG, steps: int = 4) -> StepJudge:
    judge = StepJudge(config)
    assert [judge.judge(*step) for step in CALM[:steps]] == [None] * steps
    return judge


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_fault_from_the_first_step_on(bad: float) -> None:
    assert StepJudge(CONFIG).judge(bad, 1.0) == Fault(f"loss is {bad}", "skip")
    assert StepJudge(CONFIG).judge(1.0, bad) == Fault(f"grad_norm is {bad}", "skip")


@pytest.mark.parametrize(
    ("loss", "norm", "name"),
    [
        (2 + 3.01 * DEVIATION, 1.0, "loss"),
        (2.0, 1 + 3.01 * DEVIATION, "grad_norm"),
        (2 + 2.99 * DEVIATION, 1 + 2.99 * DEVIATION, None),
        (-50.0, 0.0, None),  # down is no leap
    ],
)
def test_a_leap_is_so_many_deviations_up(loss: float, norm: float, name: str | None) -> None:
    assert pytest.approx(statistics.pstdev(step[0] for step in CALM)) == DEVIATION
    fault = calm().judge(loss, norm)
    assert (fault is None) == (name is None)
    if fault is not None:
        assert fault.what.startswith(f"{name} leaps to") and fault.action == "rollback"


def test_nothing_is_a_leap_before_the_window_is_full() -> None:
    judge = calm(steps=3)
    assert judge.judge(100.0, 1.0) is None
    assert judge.judge(500.0, 1.0) is not None


def test_faulty_steps_are_not_remembered() -> None:
    judge = calm()
    for _ in range(9):
        assert judge.judge(9.0, 1.0) is not None
        assert judge.judge(math.nan, 1.0) is not None
    assert judge.judge(2.0, 1.0) is None


def test_the_window_moves() -> None:
    judge = calm()
    for loss in (2.1, 2.3, 2.5, 2.7, 2.9, 3.1):
        assert judge.judge(loss, 1.0) is None
    assert judge.judge(1.9, 1.0) is None


def test_its_state_survives_json_bit_by_bit() -> None:
    one = calm()
    one.judge(2.0 + 1e-15, 1 / 3)
    other = StepJudge(CONFIG)
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert other.judge(9.0, 1.0) == one.judge(9.0, 1.0) is not None


def test_only_a_recorded_fault_is_updated_with() -> None:
    assert [Fault("", action).updates for action in ("record", "stop", "skip", "rollback")] == [
        True,
        False,
        False,
        False,
    ]
