"""Cuts a mask into tiles: runs of queries on one or two slices of the sorted keys. Numbers only, no tensors.

With keys sorted by code, what a query sees is one slice of public and one of private keys. With queries sorted by their
intervals, splits and samples become runs of rows whose slices agree or grow slowly. A tile takes some neighbouring rows
and the union of their slices; rows that see less than the union need a mask. Wide tiles waste masked pairs, narrow
tiles waste the fixed cost of a call: the cheapest cut of the row order is found by dynamic programming. So an image is
one tile without a mask, a long causal text a staircase, and a few tiny samples share one masked tile.

Letters: T queries, S keys, R rows and K keys of a tile.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megabagel_kernels.attention.mask import AttentionCodes

# Cost of a tile in units of one visible pair, forward and backward together; from a least-squares fit of a CPU's times
# over R = 8 ... 400 and K = 16 ... 1600, several head counts. Only the cut depends on it, never the result.
CALL_COST = 2048  # a call without arithmetic
KEY_COST = 4  # per key, beside its R pairs: load, accumulate gradients
MASK_COST = 1 / 16  # per pair: add the mask

STEP = 16  # a causal run may be cut at every STEP-th row
REACH = 24  # a tile joins at most this many indivisible blocks of rows

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of the query order on slices of the key order.

    `hidden_RK` is true where a row does not see a key; it leaves out the first `common` keys, which every row sees.
    None if the rows are alike: each sees all keys of the tile.
    """

    start: int
    stop: int
    keys: tuple[slice, ...]
    common: int
    hidden_RK: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Tiling:
    """Tiles that follow one another without gaps, and the orders that they refer to."""

    rows: Index  # queries that see a key, by their intervals
    keys: Index  # keys without padding, by code
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class _Slices:
    """Per row or block: slices [a0, a1) and [b0, b1) of the key order; [S, 0) if empty, which unions ignore."""

    a0: Index
    a1: Index
    b0: Index
    b1: Index

    def of(self, picked: slice | Index) -> "_Slices":
        return _Slices(self.a0[picked], self.a1[picked], self.b0[picked], self.b1[picked])

    def unions(self) -> "_Slices":
        """Slice unions of the first 1, 2, 3, ... entries."""
        lowest, highest = np.minimum.accumulate, np.maximum.accumulate
        return _Slices(lowest(self.a0), highest(self.a1), lowest(self.b0), highest(self.b1))

    def sizes(self) -> Index:
        """Number of keys in both slices."""
        return np.maximum(self.a1 - self.a0, 0) + np.maximum(self.b1 - self.b0, 0)


def cut_into_tiles(codes: AttentionCodes) -> Tiling:
    """The cheapest tiling of a mask under the cost model above; exact for any order and any subset of tokens."""
    keys = np.argsort(codes.key_code, kind="stable")
    keys = keys[np.searchsorted(codes.key_code[keys], 0) :]
    slices = _slices(codes, codes.key_code[keys])
    rows = np.lexsort((codes.b1, codes.b0, codes.a1, codes.a0))
    rows = rows[slices.sizes()[rows] > 0]
    by_row = slices.of(rows)
    borders, uniform = _blocks(by_row)
    cuts = borders[_cheapest_cuts(by_row, borders, uniform)]
    return Tiling(rows, keys, tuple(_tile(by_row, start, stop) for start, stop in pairwise(cuts.tolist())))


def _slices(codes: AttentionCodes, ordered: npt.NDArray[np.int32]) -> _Slices:
    a0, a1, b0, b1 = (np.searchsorted(ordered, bound) for bound in (codes.a0, codes.a1, codes.b0, codes.b1))
    for start, stop in ((a0, a1), (b0, b1)):
        empty = start >= stop
        start[empty], stop[empty] = len(ordered), 0
    return _Slices(a0, a1, b0, b1)


def _blocks(by_row: _Slices) -> tuple[Index, npt.NDArray[np.bool_]]:
    """Borders (0 ... T) of the blocks that tiles are made of, and whether the rows of a block see the same keys.

    A block is a run of equal rows, or up to STEP rows of a causal run.
    """
    count = len(by_row.a0)
    if count == 0:
        return np.zeros(1, np.int64), np.zeros(0, bool)
    differs = np.ones(count, bool)
    differs[1:] = np.any([np.diff(bound) != 0 for bound in (by_row.a0, by_row.a1, by_row.b0, by_row.b1)], axis=0)
    start = np.flatnonzero(differs)
    single = np.diff(start, append=count) == 1
    turn = np.ones(len(start), bool)  # the first row of a run of equal rows, or the row after one
    turn[1:] = ~(single[1:] & single[:-1])
    kept = turn | (start % STEP == 0)
    borders = np.append(start[kept], count)
    return borders, np.add.reduceat(np.ones(len(start), np.int64), np.flatnonzero(kept)) == 1


def _cheapest_cuts(by_row: _Slices, borders: Index, uniform: npt.NDArray[np.bool_]) -> Index:
    """Positions in `borders` of the cuts with the least total cost, first and last border included."""
    count = len(uniform)
    if count == 0:
        return np.zeros(1, np.int64)
    union = _union_of_blocks(by_row, borders)
    best = np.full(count + 1, np.inf)
    best[0] = 0
    previous = np.zeros(count + 1, np.int64)
    for first in range(count):
        stop = min(first + REACH, count)
        keys = union.of(slice(first, stop)).unions().sizes()
        rows = borders[first + 1 : stop + 1] - borders[first]
        masked = np.ones(stop - first)
        masked[0] = not uniform[first]
        cost = best[first] + CALL_COST + keys * (rows * (1 + MASK_COST * masked) + KEY_COST)
        reached = slice(first + 1, stop + 1)
        previous[reached] = np.where(cost < best[reached], first, previous[reached])
        best[reached] = np.minimum(cost, best[reached])
    cuts = [count]
    while cuts[-1]:
        cuts.append(previous[cuts[-1]])
    return np.array(cuts[::-1])


def _union_of_blocks(by_row: _Slices, borders: Index) -> _Slices:
    start = borders[:-1]
    return _Slices(
        np.minimum.reduceat(by_row.a0, start),
        np.maximum.reduceat(by_row.a1, start),
        np.minimum.reduceat(by_row.b0, start),
        np.maximum.reduceat(by_row.b1, start),
    )


def _tile(by_row: _Slices, start: int, stop: int) -> Tile:
    rows = by_row.of(slice(start, stop))
    bounds = [(int(bound.min()), int(bound.max())) for bound in (rows.a0, rows.a1, rows.b0, rows.b1)]
    (a0, last_a0), (first_a1, a1), (b0, _), (_, b1) = bounds
    keys = tuple(slice(low, high) for low, high in ((a0, a1), (b0, b1)) if low < high)
    # Rows that begin at the same public key all see as many of the next keys as the row that stops first.
    common = max(first_a1 - a0, 0) if a0 == last_a0 else 0
    if all(low == high for low, high in bounds):
        return Tile(start, stop, keys, common, None)
    position_K = np.concatenate([np.arange(part.start, part.stop) for part in keys])[common:]
    in_a = (rows.a0[:, None] <= position_K) & (position_K < rows.a1[:, None])
    in_b = (rows.b0[:, None] <= position_K) & (position_K < rows.b1[:, None])
    return Tile(start, stop, keys, common, ~(in_a | in_b))
