"""Cut of a mask into tiles, the calls of the CPU engine: runs of queries on one or two slices of the sorted keys.

With keys sorted by code, a query sees one slice of the public and one slice of the private keys. With queries sorted by
their ranges, segments and samples become runs of rows whose slices agree or grow slowly. A tile takes some neighbouring
rows and the union of their slices; rows that see less than the union need a mask. Large tiles waste masked pairs, small
tiles waste the fixed cost of a call, so dynamic programming finds the cheapest cut. An image becomes one tile without a
mask, a long causal text a staircase, and several tiny samples share one masked tile. Neighbouring images of equal size
that see only themselves (as in a vision tower) become one tile that is computed as a batch.

NumPy only, no tensors. Letters: T queries, K keys, t and s those of a tile.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megabagel_kernels.attention.mask import AttentionRanges

# Cost of a tile in units of one visible pair, forward and backward together. Least-squares fit of times on one CPU for
# t = 8 ... 400 queries, s = 16 ... 1600 keys and several head counts. Only the cut depends on it, never the result.
CALL_COST = 2048  # fixed cost of a call
KEY_COST = 4  # per key, beside its pairs: load, accumulate gradients
MASK_COST = 1 / 16  # per pair: add the mask

STEP = 16  # a causal run may be cut at every STEP-th row: finer cuts would cost planning time
REACH = 24  # a tile joins at most this many blocks of rows, which bounds the planning time

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of the query order on slices of the key order.

    `batch` is 1, or the number of equal parts of rows and keys such that part i sees exactly part i.
    `hidden_ts` is true where a row does not see a key; its columns start after the first `common` keys, which every row
    sees. None if every row sees all keys of the tile (or of its part).
    """

    start: int
    stop: int
    batch: int
    keys: tuple[slice, ...]
    common: int
    hidden_ts: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Tiling:
    """Tiles without gaps between them, and the orders of queries and keys that they refer to."""

    rows: Index  # queries that see a key, sorted by their ranges
    keys: Index  # keys without padding, sorted by code
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class _Slices:
    """Per row or block: slices [a0, a1) of public and [b0, b1) of private keys in the key order.

    Empty slices are [S, 0), which minimum and maximum of a union ignore.
    """

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


def cut_into_tiles(ranges: AttentionRanges) -> Tiling:
    """The cheapest tiling of a mask under the cost model above; exact for any order and any subset of tokens."""
    keys = np.argsort(ranges.key_code, kind="stable")
    keys = keys[np.searchsorted(ranges.key_code[keys], 0) :]
    slices = _slices(ranges, ranges.key_code[keys])
    rows = np.lexsort(ranges.of_queries[::-1])
    rows = rows[slices.sizes()[rows] > 0]
    by_row = slices.of(rows)
    blocks = _join_equal(by_row, _blocks(by_row))
    return Tiling(rows, keys, tuple(_tile(by_row, blocks, i, j) for i, j in pairwise(_cheapest_cuts(by_row, blocks))))


def _slices(ranges: AttentionRanges, ordered: npt.NDArray[np.int32]) -> _Slices:
    a0, a1, b0, b1 = (np.searchsorted(ordered, bound) for bound in ranges.of_queries)
    for start, stop in ((a0, a1), (b0, b1)):
        empty = start >= stop
        start[empty], stop[empty] = len(ordered), 0
    return _Slices(a0, a1, b0, b1)


@dataclass(frozen=True)
class _Blocks:
    """Indivisible parts of tiles: block i has rows `borders[i]` to `borders[i + 1]`.

    `batch[i]` is 0 if its rows see different keys (a causal run), 1 if they see the same keys, and more if there are
    that many equal parts, each of which sees exactly itself.
    """

    borders: Index
    batch: Index


def _blocks(by_row: _Slices) -> _Blocks:
    """Runs of equal rows, and STEP rows at a time of causal runs."""
    count = len(by_row.a0)
    if count == 0:
        return _Blocks(np.zeros(1, np.int64), np.zeros(0, np.int64))
    differs = np.ones(count, bool)
    differs[1:] = np.any([np.diff(bound) != 0 for bound in (by_row.a0, by_row.a1, by_row.b0, by_row.b1)], axis=0)
    start = np.flatnonzero(differs)
    single = np.diff(start, append=count) == 1
    turn = np.ones(len(start), bool)  # the first row of a run of equal rows, or the row after one
    turn[1:] = ~(single[1:] & single[:-1])
    other_sample = np.diff(by_row.a0[start], prepend=-1) != 0
    kept = turn | other_sample | (start % STEP == 0)
    different_rows = np.add.reduceat(np.ones(len(start), np.int64), np.flatnonzero(kept))
    return _Blocks(np.append(start[kept], count), (different_rows == 1).astype(np.int64))


def _join_equal(by_row: _Slices, blocks: _Blocks) -> _Blocks:
    """Join neighbouring blocks with equally many rows that see equally many keys, all public and next to each other."""
    if len(blocks.batch) == 0:
        return blocks
    first, rows = by_row.of(blocks.borders[:-1]), np.diff(blocks.borders)
    plain = (blocks.batch == 1) & (first.b0 >= first.b1)
    joins = np.zeros(len(rows), bool)
    joins[1:] = plain[1:] & plain[:-1] & (np.diff(rows) == 0) & (np.diff(first.sizes()) == 0)
    joins[1:] &= first.a0[1:] == first.a1[:-1]
    kept = np.flatnonzero(~joins)
    return _Blocks(np.append(blocks.borders[kept], blocks.borders[-1]), np.add.reduceat(blocks.batch, kept))


def _cheapest_cuts(by_row: _Slices, blocks: _Blocks) -> list[int]:
    """Indices of the borders at which the cheapest cut runs, first and last border included."""
    borders, count = blocks.borders, len(blocks.batch)
    if count == 0:
        return [0]
    union = _union_of_blocks(by_row, borders)
    best = np.full(count + 1, np.inf)
    best[0] = 0
    previous = np.zeros(count + 1, np.int64)
    for first in range(count):
        stop = min(first + REACH, count)
        keys = union.of(slice(first, stop)).unions().sizes()
        rows = (borders[first + 1 : stop + 1] - borders[first]) * (1 + MASK_COST)
        if blocks.batch[first]:
            rows[0] = (borders[first + 1] - borders[first]) / blocks.batch[first]  # a block by itself needs no mask
        cost = best[first] + CALL_COST + keys * (rows + KEY_COST)
        reached = slice(first + 1, stop + 1)
        previous[reached] = np.where(cost < best[reached], first, previous[reached])
        best[reached] = np.minimum(cost, best[reached])
    cuts = [count]
    while cuts[-1]:
        cuts.append(int(previous[cuts[-1]]))
    return cuts[::-1]


def _union_of_blocks(by_row: _Slices, borders: Index) -> _Slices:
    start = borders[:-1]
    return _Slices(
        np.minimum.reduceat(by_row.a0, start),
        np.maximum.reduceat(by_row.a1, start),
        np.minimum.reduceat(by_row.b0, start),
        np.maximum.reduceat(by_row.b1, start),
    )


def _tile(by_row: _Slices, blocks: _Blocks, first: int, last: int) -> Tile:
    start, stop = int(blocks.borders[first]), int(blocks.borders[last])
    rows = by_row.of(slice(start, stop))
    bounds = [(int(bound.min()), int(bound.max())) for bound in (rows.a0, rows.a1, rows.b0, rows.b1)]
    (a0, last_a0), (first_a1, a1), (b0, _), (_, b1) = bounds
    keys = tuple(slice(low, high) for low, high in ((a0, a1), (b0, b1)) if low < high)
    if last == first + 1 and blocks.batch[first]:
        return Tile(start, stop, int(blocks.batch[first]), keys, 0, None)
    # Rows that begin at the same public key all see as many of the next keys as the row that stops first.
    common = max(first_a1 - a0, 0) if a0 == last_a0 else 0
    position_s = np.concatenate([np.arange(part.start, part.stop) for part in keys])[common:]
    in_a = (rows.a0[:, None] <= position_s) & (position_s < rows.a1[:, None])
    in_b = (rows.b0[:, None] <= position_s) & (position_s < rows.b1[:, None])
    return Tile(start, stop, 1, keys, common, ~(in_a | in_b))
