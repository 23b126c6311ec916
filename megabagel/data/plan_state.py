"""The place of a plan in the data, as a checkpoint holds it: types and ranges of what is read back."""

from collections.abc import Mapping
from dataclasses import dataclass

from megabagel.config.typed_json import Count, Positive, WrongValue


@dataclass(frozen=True)
class PlanState:
    """See `GlobalPlan.state`."""

    fingerprint: dict[str, str]
    seed: int
    step: Count
    draws: Count
    cursors: dict[str, tuple[Count, Count]]
    """By source: epoch, and samples of it that were taken."""
    begun: dict[str, tuple[Count, Positive]]
    """By source: epoch that was begun when it had so many samples."""
    window: tuple[tuple[str, Count, Count], ...]
    """Waiting samples: source, number, epoch."""
    skipped: dict[str, Count]

    def check(self, samples: Mapping[str, int]) -> None:
        """Raise WrongValue where a place lies outside of the sources; `samples`: of each source."""
        if self.cursors.keys() != samples.keys():
            raise WrongValue(f"plan.cursors is of {sorted(self.cursors)!a:.80}; expected {sorted(samples)!a:.80}")
        for name, (epoch, known) in self.begun.items():
            if known > samples.get(name, 0) or epoch > self.cursors[name][0]:
                raise WrongValue(
                    f"plan.begun.{name!a:.40} is epoch {epoch} with {known} of {samples.get(name, 0)} samples"
                )
        for number, (name, sample, epoch) in enumerate(self.window):
            if sample >= samples.get(name, 0) or epoch > self.cursors[name][0]:
                raise WrongValue(f"plan.window.{number} is sample {sample} of {name!a:.40}, epoch {epoch}")
