"""Schema of the data position in a checkpoint: types and ranges that are checked when a plan resumes."""

from collections.abc import Mapping
from dataclasses import dataclass

from megabagel.config.typed_json import Count, Positive, WrongValue


@dataclass(frozen=True)
class PlanState:
    """Position of a `GlobalPlan` in the data, as `GlobalPlan.state` writes it."""

    fingerprint: dict[str, str]
    seed: int
    step: Count
    draws: Count
    cursors: dict[str, tuple[Count, Count]]
    """Per source: the epoch, and the number of samples drawn from it so far."""
    begun: dict[str, tuple[Count, Positive]]
    """Per source that has grown: the epoch, and the number of samples that the source had when the epoch began."""
    window: tuple[tuple[str, Count, Count], ...]
    """Samples that are drawn but not yet packed: source, sample number, epoch."""
    skipped: dict[str, Count]

    def check(self, samples: Mapping[str, int]) -> None:
        """Check that all positions lie inside the sources.

        Args:
            samples: number of samples per source.

        Raises:
            WrongValue: a source, sample or epoch that does not exist.
        """
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
