"""Steps that a run should not take: losses and gradients that are not finite, or leap up."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megabagel.config.schema import TrainConfig

Action = Literal["record", "stop", "skip", "rollback"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step, in words, and what its policy asks for."""

    what: str
    action: Action

    @property
    def updates(self) -> bool:
        """Whether the step's update is made all the same."""
        return self.action == "record"


class StepJudge:
    """Judges every step before its update, from numbers that are equal on all ranks.

    A value leaps up when it lies more than `train.spike_sigma` standard deviations above the mean of the last
    `train.spike_window` steps that did not. Its memory is part of a checkpoint, so that a run that goes on judges
    as one that was never cut.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._past = {name: deque[float](maxlen=config.spike_window) for name in ("loss", "grad_norm")}

    def judge(self, loss: float, norm: float) -> Fault | None:
        """Take a step's loss and gradient norm; the fault, if there is one."""
        found = {"loss": loss, "grad_norm": norm}
        for name, value in found.items():
            if not math.isfinite(value):
                return Fault(f"{name} is {value}", self.config.on_nonfinite)
        leaps = [self._leap(name, value) for name, value in found.items()]
        said = next((leap for leap in leaps if leap), None)
        if said:
            return Fault(said, self.config.on_spike)
        for name, value in found.items():
            self._past[name].append(value)
        return None

    def _leap(self, name: str, value: float) -> str | None:
        past = self._past[name]
        if len(past) < self.config.spike_window:
            return None
        mean = math.fsum(past) / len(past)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))
        if value <= mean + self.config.spike_sigma * deviation:
            return None
        return f"{name} leaps to {value:.6g}, after {mean:.6g} +- {deviation:.2g} over {len(past)} steps"

    def state(self) -> dict[str, list[float]]:
        """What it remembers, as JSON values."""
        return {name: list(past) for name, past in self._past.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; it may come from a longer or a shorter window."""
        self._past = {name: deque(state.get(name, ()), maxlen=self.config.spike_window) for name in self._past}
