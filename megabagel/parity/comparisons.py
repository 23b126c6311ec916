"""Comparisons of one number or tensor with the official one, each with a gate (largest allowed difference)."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["max_abs", "rel_l2", "exact"]

SPLIT = 3.0
"""Gates of runs on several ranks, in those of one: partial sums are added in another order."""


@dataclass(frozen=True)
class Gate:
    """How close is close: the largest allowed value of one measure; `None`: reported, not judged."""

    measure: Measure
    limit: float | None


@dataclass(frozen=True)
class Gates:
    """The gates of one run. In bf16 only what is exact and the reduced losses are judged."""

    scale: float = 1.0
    bf16: bool = False
    exact: Gate = field(default=Gate("exact", 0.0), init=False)

    def _gate(self, measure: Measure, limit: float, bf16: float | None = None) -> Gate:
        return Gate(measure, bf16 if self.bf16 else limit * self.scale)

    @property
    def ce(self) -> Gate:
        """Cross-entropy per token."""
        return self._gate("max_abs", 2e-5)

    @property
    def hidden(self) -> Gate:
        """Hidden states and squared errors per element."""
        return self._gate("rel_l2", 5e-6)

    @property
    def gradient(self) -> Gate:
        """Gradients and their norms."""
        return self._gate("rel_l2", 2e-5)

    @property
    def update(self) -> Gate:
        """Change of weights and averaged weights over the steps of a trace."""
        return self._gate("rel_l2", 2e-3)

    @property
    def reduced_ce(self) -> Gate:
        """Reduced cross-entropy, and the total of both losses."""
        return self._gate("max_abs", 5e-6, bf16=0.03)

    @property
    def reduced_mse(self) -> Gate:
        """Reduced flow loss."""
        return self._gate("max_abs", 5e-6, bf16=0.05)

    @property
    def block(self) -> Gate:
        """Building blocks: tables, rotations, the autoencoder."""
        return self._gate("rel_l2", 1e-5)


@dataclass(frozen=True)
class Row:
    """One comparison. `rel_l2`: L2 norm of the difference over that of the expected; `max_rel`: largest difference
    over the largest expected value."""

    name: str
    max_abs: float
    max_rel: float
    rel_l2: float
    gate: Gate
    worst: str = ""
    """Of a group of comparisons in one row: the one whose numbers these are."""

    @property
    def error(self) -> float:
        """The value that is judged."""
        return {"max_abs": self.max_abs, "rel_l2": self.rel_l2, "exact": self.max_abs}[self.gate.measure]

    @property
    def verdict(self) -> str:
        """`ok`, `FAIL`, or `-` where nothing is judged. What is not a number fails."""
        if self.gate.limit is None:
            return "-"
        return "ok" if self.error <= self.gate.limit else "FAIL"


def compare(name: str, ours: Tensor | float | None, theirs: Tensor | float, gate: Gate, scale: float = 0.0) -> Row:
    """Compare two tensors or numbers in float64. A missing value or another shape counts as an infinite difference.

    Args:
        name: label of the row.
        ours: value of this project; None: missing.
        theirs: official value.
        gate: measure and its largest allowed value.
        scale: norm by which `rel_l2` is divided; 0: the norm of the official value.
    """
    expected = torch.as_tensor(theirs, dtype=torch.float64)
    if ours is None or torch.as_tensor(ours).shape != expected.shape:
        return Row(name, torch.inf, torch.inf, torch.inf, gate)
    difference = (torch.as_tensor(ours, dtype=torch.float64) - expected).flatten()
    largest = float(difference.abs().max()) if len(difference) else 0.0
    return Row(
        name,
        max_abs=largest,
        max_rel=_ratio(largest, float(expected.abs().max()) if expected.numel() else 0.0),
        rel_l2=_ratio(float(difference.norm()), scale or float(expected.norm())),
        gate=gate,
    )


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else 0.0 if difference == 0 else torch.inf


def worst(name: str, rows: Iterable[Row]) -> Row | None:
    """The row that comes closest to its gate, or goes furthest beyond, for a group of rows with one gate."""
    found = list(rows)
    if not found:
        return None
    row = max(found, key=lambda row: row.error if row.error == row.error else torch.inf)
    return replace(row, name=f"{name} ({len(found)})", worst=row.name)
