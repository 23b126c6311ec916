"""Which steps are anomalies, by hand-made losses and norms."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from megabagel.config.schema import TrainConfig
from megabagel.train.anomaly import Action, LossSpikeDetector, StepAnomaly

CONFIG = TrainConfig(on_nonfinite="skip", on_spike="rollback", spike_sigma=3.0, spike_window=4, spike_warmup=0)
CALM = [(2.0, 1.0), (2.2, 1.2), (1.8, 0.8), (2.0, 1.0)]
"""Mean and deviation of the losses are 2 and sqrt(0.02), of the norms 1 and sqrt(0.02)."""
DEVIATION = math.sqrt(0.02)


def calm(config: TrainConfig = CONFIG, steps: int = 4) -> LossSpikeDetector:
    detector = LossSpikeDetector(config)
    assert [detector.check(number + 1, *step) for number, step in enumerate(CALM[:steps])] == [None] * steps
    return detector


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_anomaly_from_the_first_step_on(bad: float) -> None:
    config = replace(CONFIG, spike_warmup=1000)
    expected = StepAnomaly(f"loss is {bad}", "skip", "train.on_nonfinite")
    assert LossSpikeDetector(config).check(1, bad, 1.0) == expected
    expected = StepAnomaly(f"gradient norm is {bad}", "skip", "train.on_nonfinite")
    assert LossSpikeDetector(config).check(1, 1.0, bad) == expected


@pytest.mark.parametrize(
    ("loss", "norm", "name"),
    [
        (2 + 3.01 * DEVIATION, 1.0, "loss"),
        (2.0, 1 + 3.01 * DEVIATION, "gradient norm"),
        (2 + 2.99 * DEVIATION, 1 + 2.99 * DEVIATION, None),
        (-50.0, 0.0, None),  # down is no spike
    ],
)
def test_a_spike_is_so_many_deviations_up(loss: float, norm: float, name: str | None) -> None:
    assert pytest.approx(statistics.pstdev(step[0] for step in CALM)) == DEVIATION
    anomaly = calm().check(5, loss, norm)
    assert (anomaly is None) == (name is None)
    if anomaly is not None:
        assert anomaly.what.startswith(f"{name} spike ") and anomaly.what.endswith(", std 0.14 over 4 steps)")
        assert (anomaly.action, anomaly.setting) == ("rollback", "train.on_spike")


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    detector = calm(steps=3)
    assert detector.check(4, 100.0, 1.0) is None
    assert detector.check(5, 500.0, 1.0) is not None


def test_nothing_is_a_spike_in_the_warm_up_and_its_steps_fill_the_window() -> None:
    detector = calm(replace(CONFIG, spike_warmup=5))
    assert detector.check(5, 9.0, 1.0) is None
    assert [len(past) for past in detector.state().values()] == [4, 4] and 9.0 in detector.state()["loss"]
    assert detector.check(6, 90.0, 1.0) is not None


def test_the_default_is_quiet_where_a_healthy_run_jumps() -> None:
    """As `examples/configs/demo.yaml` in step 182: norms of 0.93 +- 0.35, then 6.49."""
    detector = LossSpikeDetector(TrainConfig())
    for step in range(1, 182):
        assert detector.check(step, 1.0, 0.93 + 0.35 * (-1) ** step) is None
    assert detector.check(182, 1.0, 6.49) is None
    for step in range(183, 501):
        assert detector.check(step, 1.0, 0.93 + 0.35 * (-1) ** step) is None
    assert detector.check(501, 1.0, 6.49) is not None


def test_anomalies_stay_out_of_the_window() -> None:
    detector = calm()
    for step in range(5, 14):
        assert detector.check(step, 9.0, 1.0) is not None
        assert detector.check(step, math.nan, 1.0) is not None
    assert detector.check(14, 2.0, 1.0) is None


def test_the_window_moves() -> None:
    detector = calm()
    for step, loss in enumerate((2.1, 2.3, 2.5, 2.7, 2.9, 3.1)):
        assert detector.check(5 + step, loss, 1.0) is None
    assert detector.check(11, 1.9, 1.0) is None


def test_its_state_survives_json_bit_by_bit() -> None:
    one = calm()
    one.check(5, 2.0 + 1e-15, 1 / 3)
    other = LossSpikeDetector(CONFIG)
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert other.check(6, 9.0, 1.0) == one.check(6, 9.0, 1.0) is not None


def test_only_a_recorded_anomaly_is_updated_with() -> None:
    actions: tuple[Action, ...] = ("record", "stop", "skip", "rollback")
    assert [StepAnomaly("", action, "").updates for action in actions] == [True, False, False, False]
