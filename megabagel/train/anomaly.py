"""Step anomalies: a loss or gradient norm that is not finite, or a spike."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megabagel.config.schema import TrainConfig
from megabagel.config.typed_json import read_as

Action = Literal["record", "stop", "skip", "rollback"]

_TITLES = {"loss": "loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class StepAnomaly:
    """An anomaly of one step, and the policy for it."""

    what: str
    """Such as "gradient norm spike 6.49 (mean 0.93, std 0.35 over 128 steps)"."""
    action: Action
    setting: str
    """Config key that the action comes from."""

    @property
    def updates(self) -> bool:
        """Whether the step's update is made all the same."""
        return self.action == "record"


class LossSpikeDetector:
    """Checks every step before its update, on numbers that are equal on all ranks.

    A spike lies more than `train.spike_sigma` standard deviations above the mean of the last `train.spike_window` steps
    without one. The first `train.spike_warmup` steps of a run fill the window and have no spikes: both numbers fall
    fast there, and the norm jumps while a model finds its first solution. In `examples/configs/demo.yaml`, which learns
    well, it did so once, by 16 standard deviations in step 182.

    The window is part of a checkpoint, so that a resumed run detects what an uninterrupted one would.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._past = {name: deque[float](maxlen=config.spike_window) for name in _TITLES}

    def check(self, step: int, loss: float, grad_norm: float) -> StepAnomaly | None:
        """The anomaly of a step, if it has one.

        Args:
            step: number of the step, from 1.
            loss: over the global batch.
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
        for name, value in found.items():
            self._past[name].append(value)
        return None

    def _spike(self, name: str, value: float) -> str | None:
        past = self._past[name]
        if len(past) < self.config.spike_window:
            return None
        mean = math.fsum(past) / len(past)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))
        if value <= mean + self.config.spike_sigma * std:
            return None
        return f"{_TITLES[name]} spike {value:.6g} (mean {mean:.6g}, std {std:.2g} over {len(past)} steps)"

    def state(self) -> dict[str, list[float]]:
        """The window, as JSON values."""
        return {name: list(past) for name, past in self._past.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, of a longer or a shorter window too. Raises WrongValue for none of its kind."""
        past = read_as(dict[str, tuple[float, ...]], state, "judge")
        self._past = {name: deque(past.get(name, ()), maxlen=self.config.spike_window) for name in self._past}
