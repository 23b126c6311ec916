"""Means with 95 % confidence intervals: proportions (Wilson), graded scores, and paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values and its 95 % confidence interval."""

    value: float
    low: float
    high: float
    count: int

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """The mean and its interval, such as `0.250 (0.102-0.495)`."""
        value, low, high = (f"{scale * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} ({low}-{high})"

    def to_json(self) -> dict[str, float | int]:
        """As plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


def proportion(successes: int, count: int) -> Estimate | None:
    """Wilson's score interval of a share; None without any trial.

    Not the normal interval: at 0 or `count` successes that one has no width.
    """
    if not count:
        return None
    share, z2 = successes / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def mean(values: Sequence[float]) -> Estimate | None:
    """Mean of graded scores with Student's interval; None without values.

    Of values that are all 0 or 1 it is Wilson's. A single value has an interval without bounds.
    """
    if not values:
        return None
    if all(value in (0, 1) for value in values):
        return proportion(round(sum(values)), len(values))
    average = fmean(values)
    if len(values) == 1:
        return Estimate(average, -math.inf, math.inf, 1)
    half = student95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(average, average - half, average + half, len(values))


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate | None:
    """Mean of `second - first`, value by value, with Student's interval."""
    return mean([b - a for a, b in zip(first, second, strict=True)])


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's distribution with 1 to 10 degrees of freedom."""


def student95(freedom: int) -> float:
    """97.5 % quantile of Student's distribution."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Cornish-Fisher expansion around the normal quantile; above 10 degrees of freedom its error is below 0.0005.
    z, n = Z95, freedom
    first, second = (z**3 + z) / (4 * n), (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return z + first + second + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
