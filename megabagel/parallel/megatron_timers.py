"""Phases (`runtime.phase`) inside megatron-core's schedules, entered through the hook `TransformerConfig.timers`.

Schedules and the p2p communicator start and stop a named timer around each backward pass and each exchange with a
neighbouring stage. Interleaved schedules overlap exchanges and wait for some of them outside of any timer; that part of
the wait is attributed to no phase of its own.
"""

from megabagel.runtime.phase import phase
from megabagel.runtime.rank_clock import clock


class PhaseTimers:
    """Replacement of `megatron.core.timers.Timers` that enters phases; it measures nothing itself."""

    def __init__(self) -> None:
        self._timers: dict[str, _PhaseTimer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_PhaseTimer":
        """Return the timer of that name; `log_level` is part of megatron-core's interface and has no effect."""
        if name not in self._timers:
            self._timers[name] = _PhaseTimer(_phase_for(name), waits=_is_exchange(name))
        return self._timers[name]


class _PhaseTimer:
    """Timer whose `start` enters a phase and whose `stop` leaves it; without a phase both do nothing."""

    def __init__(self, entered: phase | None, waits: bool) -> None:
        self._phase, self._waits = entered, waits

    def start(self, barrier: bool = False) -> None:
        """Enter the phase. `barrier` is ignored."""
        # A barrier would synchronize all stages at every timer and so change the times that are measured.
        if self._phase is not None:
            self._phase.__enter__()
        if self._waits:
            clock.pause()

    def stop(self, barrier: bool = False) -> None:
        """Leave the phase."""
        if self._waits:
            clock.go_on()
        if self._phase is not None:
            self._phase.__exit__(None, None, None)


def _phase_for(timer: str) -> phase | None:
    """Return the phase that belongs to a timer of megatron-core, or None."""
    # "forward-compute" has none: `train.step` enters the phase of forward itself.
    if timer == "backward-compute":
        return phase("backward")
    # Not counted as progress of a step: the first and the last stage have fewer exchanges than the others.
    return phase("pipeline wait", counted=False) if _is_exchange(timer) else None


def _is_exchange(timer: str) -> bool:
    """Whether a timer of megatron-core spans an exchange with a neighbouring stage."""
    return "-send" in timer or "-recv" in timer
