"""TaylorSeer: most evaluations of a long sampling are extrapolated from earlier ones (Liu et al., 2025).

An approximation, off unless asked for. The schedule and factors are those of the released code, which keeps factors for
every layer although an extrapolated layer ignores its input: only those of the last layer reach the result, so one set
per branch gives the same numbers in 1/layers of the memory.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

FIRST_FULL = 5
"""Evaluations that are all computed."""
INTERVAL = 3
"""Afterwards every third one is."""
MOST_FACTORS = 6
DIFFERENCES_FROM = 4
"""First evaluation that forms differences; before it a factor of order 0 is all there is."""


def is_full(evaluation: int) -> bool:
    """Whether evaluation number 0, 1, 2, ... of a branch is computed rather than extrapolated."""
    return evaluation < FIRST_FULL or (evaluation - (FIRST_FULL - 1)) % INTERVAL == 0


@dataclass
class TaylorSeer:
    """Factors of one guidance branch of one picture: finite differences of its features over evaluations."""

    factors: list[Tensor] = field(default_factory=list)
    last: int = 0
    """Evaluation that made the factors."""

    def update(self, evaluation: int, features: Tensor) -> None:
        """Take the features that evaluation number `evaluation` computed."""
        factors, distance = [features], evaluation - self.last
        if evaluation >= DIFFERENCES_FROM:
            for old in self.factors[: MOST_FACTORS - 1]:
                factors.append((factors[-1] - old) / distance)
        self.factors, self.last = factors, evaluation

    def extrapolate(self, evaluation: int) -> Tensor:
        """Features expected at evaluation number `evaluation`."""
        distance = evaluation - self.last
        terms = (factor * (distance**order / math.factorial(order)) for order, factor in enumerate(self.factors))
        total = next(terms)
        for term in terms:
            total = total + term
        return total
