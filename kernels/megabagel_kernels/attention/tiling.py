"""Cuts a mask into tiles: runs of queries on one or two slices of the sorted keys. Numbers only, no tensors.

With keys sorted by code, what a query sees is one slice of public and one of private keys. With queries sorted by their
intervals, segments and samples become runs of rows whose slices agree or grow slowly. A tile takes some neighbouring
rows and the union of their slices; rows that see less than the union need a mask. Wide tiles waste masked pairs, narrow
tiles waste the fixed cost of a call: the cheapest cut of the row order is found by dynamic programming. So an image is
one tile without a mask, a long causal text a staircase, and a few tiny samples share one masked tile. Images of equal
size that see themselves alone and lie side by side (those of a vision tower) make one tile, computed as a batch.

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

    `batch` is 1, or the number of equal parts into which rows and keys fall so that part i sees part i alone.
    `hidden_RK` is true where a row does not see a key; it leaves out the first `common` keys, which every row sees.
    None if the rows are alike: each sees all keys of the tile (or of its part).
    """

    start: int
    stop: int
    batch: int
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
    blocks = _join_equal(by_row, _blocks(by_row))
    return Tiling(rows, keys, tuple(_tile(by_row, blocks, i, j) for i, j in pairwise(_cheapest_cuts(by_row, blocks))))


def _slices(codes: AttentionCodes, ordered: npt.NDArray[np.int32]) -> _Slices:
    a0, a1, b0, b1 = (np.searchsorted(ordered, bound) for bound in (codes.a0, codes.a1, codes.b0, codes.b1))
    for start, stop in ((a0, a1), (b0, b1)):
        empty = start >= stop
        start[empty], stop[empty] = len(ordered), 0
    return _Slices(a0, a1, b0, b1)


@dataclass(frozen=True)
class _Blocks:
    """What tiles are made of: rows `borders[i]` to `borders[i + 1]`, which see equal keys in `batch[i]` equal parts.

    `batch` is 0 for rows of a causal run.
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
    """Numbers of the borders where the cut with the least total cost runs, first and last border included."""
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
    position_K = np.concatenate([np.arange(part.start, part.stop) for part in keys])[common:]
    in_a = (rows.a0[:, None] <= position_K) & (position_K < rows.a1[:, None])
    in_b = (rows.b0[:, None] <= position_K) & (position_K < rows.b1[:, None])
    return Tile(start, stop, 1, keys, common, ~(in_a | in_b))
