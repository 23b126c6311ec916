"""Phases inside megatron-core's schedules, through the hook that they offer: `TransformerConfig.timers`.

Schedules and the pipeline's communicator start and stop a named timer around each backward and each exchange with a
neighbouring stage. Interleaved schedules overlap exchanges and wait for some of them outside any timer; that part of
the wait is in no phase of its own.
"""

from megabagel.runtime.phase import phase


class PhaseTimers:
    """Takes the place of `megatron.core.timers.Timers` and enters phases; it measures nothing itself."""

    def __init__(self) -> None:
        self._timers: dict[str, _PhaseTimer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_PhaseTimer":
        """The timer of that name; `log_level` is part of megatron-core's interface and has no effect."""
        if name not in self._timers:
            self._timers[name] = _PhaseTimer(_phase_for(name))
        return self._timers[name]


class _PhaseTimer:
    """A phase that is entered by `start` and left by `stop`, or nothing."""

    def __init__(self, entered: phase | None) -> None:
        self._phase = entered

    def start(self, barrier: bool = False) -> None:
        """Enter. `barrier` is ignored: it would keep all stages in step."""
        if self._phase is not None:
            self._phase.__enter__()

    def stop(self, barrier: bool = False) -> None:
        """Leave."""
        if self._phase is not None:
            self._phase.__exit__(None, None, None)


def _phase_for(timer: str) -> phase | None:
    """The phase of a timer of megatron-core. "forward-compute" is left out: `train.step` enters that phase itself."""
    if timer == "backward-compute":
        return phase("backward")
    if "-send" in timer or "-recv" in timer:
        return phase("pipeline wait", counted=False)  # the first and the last stage have fewer exchanges
    return None
