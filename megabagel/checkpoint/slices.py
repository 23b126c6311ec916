"""Conversion of a range of the distributed optimizer's flat buffer into n-d slices of a tensor of the whole model.

The optimizer cuts parameters wherever its shards end, not at row borders. A row-major range is nevertheless a few
slices (part of a first row, whole rows, part of a last row), which a checkpoint can reshard. Ranks gather nothing, and
none writes what another holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TensorSlice:
    """Slice of a tensor: its offset and shape, and its first element in the flat range."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    at: int

    @property
    def size(self) -> int:
        """Number of elements; they are contiguous in the flat range."""
        return prod(self.shape)


def boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[TensorSlice]:
    """Yield the slices that tile the row-major range [start, stop) of a tensor of `shape`, in order."""
    yield from _boxes(start, stop, shape, (), 0)


def _boxes(start: int, stop: int, shape: tuple[int, ...], prefix: tuple[int, ...], at: int) -> Iterator[TensorSlice]:
    if start == stop:
        return
    ones, zeros = (1,) * len(prefix), (0,) * (len(shape) - 1)
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _boxes(start - last * row, stop - last * row, shape[1:], (*prefix, last), at)
        return
    if start < first * row:
        yield from _boxes(start - (first - 1) * row, row, shape[1:], (*prefix, first - 1), at)
    if first < last:
        yield TensorSlice((*prefix, first, *zeros), (*ones, last - first, *shape[1:]), at + first * row - start)
    if last * row < stop:
        yield from _boxes(0, stop - last * row, shape[1:], (*prefix, last), at + last * row - start)
