"""Anomalies of a step: a loss or gradient norm that is not finite, or a spike.

Policies: docs/faults.md#steps-that-should-not-be-taken.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megabagel.config.schema import TrainConfig
from megabagel.config.typed_json import read_as
from megabagel.errors import BadStep, Stopped

Action = Literal["record", "stop", "skip", "rollback"]

_TITLES = {"loss": "loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class StepAnomaly:
    """Anomaly of a step and the policy that the config sets for it."""

    what: str
    """Description, such as "gradient norm spike 6.49 (mean 0.93, std 0.35 over 128 steps)"."""
    action: Action
    """Policy for this step."""
    setting: str
    """Config key that set `action`."""
    ending: type[Stopped] = BadStep
    """Raised where `action` is `stop`."""

    @property
    def updates(self) -> bool:
        """Whether the optimizer's update is made in spite of the anomaly."""
        return self.action == "record"


class LossSpikeDetector:
    """Detector of anomalies, asked before every update with numbers that are equal on all ranks.

    A spike lies more than `train.spike_sigma` standard deviations above the mean of the last `train.spike_window` steps
    without one. The first `train.spike_warmup` steps of a run fill the window and have no spikes: both numbers fall
    fast there, and the norm jumps while a model finds its first solution. In two runs of `examples/configs/demo.yaml`,
    which learns well, it did so once each: by 16 standard deviations in step 182, by 7 in step 275.

    The window is part of a checkpoint, so that a resumed run detects the same steps as an uninterrupted one.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._past = {name: deque[float](maxlen=config.spike_window) for name in _TITLES}

    def check(self, step: int, loss: float, grad_norm: float) -> StepAnomaly | None:
        """Return the anomaly of a step, or None; a step without one enters the window.

        Args:
            step: number of the step, from 1.
            loss: mean over the global batch.
            grad_norm: global L2 norm before clipping.
        """
        found = {"loss": loss, "grad_norm": grad_norm}
        for name, value in found.items():
            if not math.isfinite(value):
                return StepAnomaly(f"{_TITLES[name]} is {value}", self.config.on_nonfinite, "train.on_nonfinite")
        spikes = [self._spike(name, value) for name, value in found.items()] if step > self.config.spike_warmup else []
        spike = next((spike for spike in spikes if spike), None)
        if spike:
            return StepAnomaly(spike, self.config.on_spike, "train.on_spike")
        # Only ordinary steps enter the window: a spike in it would raise the threshold for the next one.
        for name, value in found.items():
            self._past[name].append(value)
        return None

    def _spike(self, name: str, value: float) -> str | None:
        """Return the description of a spike, or None for an ordinary value or a window that is not full."""
        past = self._past[name]
        if len(past) < self.config.spike_window:
            return None
        mean = math.fsum(past) / len(past)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))
        if value <= mean + self.config.spike_sigma * std:
            return None
        return f"{_TITLES[name]} spike {value:.6g} (mean {mean:.6g}, std {std:.2g} over {len(past)} steps)"

    def state(self) -> dict[str, list[float]]:
        """Return the window as JSON values."""
        return {name: list(past) for name, past in self._past.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the window, also from a run with a longer or shorter one.

        Raises:
            WrongValue: `state` is not of the form that `state()` returns.
        """
        past = read_as(dict[str, tuple[float, ...]], state, "judge")
        self._past = {name: deque(past.get(name, ()), maxlen=self.config.spike_window) for name in self._past}
