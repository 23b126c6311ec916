"""Which blocks of the score matrix a kernel has to visit, and which of them need no mask.

The score matrix of T queries and S keys is cut into blocks of `rows` x `cols`. A block without a visible pair is absent
from the lists, a block with only visible pairs is full, any other block is partial. The classes are exact, yet no T x S
matrix is made: queries and keys are cut into *pieces* (at block borders, and where their description stops being
constant or counting up by one), and whether any or all pairs of two pieces are visible is a comparison of intervals.

Tokens may lie in any order; the more neighbours differ, the more pieces, up to one per token.

Letters: T queries, S keys, P pieces of queries, R pieces of keys, B blocks of queries, C blocks of keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megabagel_kernels.attention.mask import PRIVATE, AttentionCodes

EMPTY, PARTIAL, FULL = 0, 1, 2

PARTIAL_COST = 1.3
"""Time of a partial block, in full blocks; only the processing order depends on it."""

PAIRS_AT_ONCE = 2**22
"""Pairs of pieces compared in one step: bounds the memory for tokens in random order."""

Index = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """What each block of one side visits on the other side.

    `work[i] = (block, full_start, full_stop, partial_start, partial_stop)`, heaviest block first: `block` visits the
    full blocks `blocks[full_start:full_stop]` and the partial blocks `blocks[partial_start:partial_stop]`. Every block
    has a row, also one that visits nothing. `blocks` ends with an entry that belongs to no list, because kernels read
    one entry ahead.
    """

    work: Int32  # [B, 5]
    blocks: Int32  # [visited + 1]

    @staticmethod
    def of(kinds: Kinds) -> "BlockLists":
        """Lists of the rows of [B, C] kinds; of the columns for the transposed matrix."""
        full, partial = kinds == FULL, kinds == PARTIAL
        _, blocks = np.nonzero(np.concatenate([full, partial], axis=1))
        full_count, partial_count = full.sum(1), partial.sum(1)
        stop = np.cumsum(full_count + partial_count)
        partial_start = stop - partial_count
        full_start = partial_start - full_count
        work = np.stack([np.arange(len(kinds)), full_start, partial_start, partial_start, stop], axis=1)
        heaviest_first = np.argsort(-(full_count + PARTIAL_COST * partial_count), kind="stable")
        padded = np.append(blocks % max(kinds.shape[1], 1), 0)
        return BlockLists(work[heaviest_first].astype(np.int32), padded.astype(np.int32))


def classify(codes: AttentionCodes, rows: int, cols: int) -> Kinds:
    """EMPTY, PARTIAL or FULL for each block of `rows` queries x `cols` keys: int8 [ceil(T / rows), ceil(S / cols)].

    A last block that is cut short by T or S is never FULL: the kernel needs the mask to leave out what lies beyond.
    """
    kinds = np.zeros((-(-codes.queries // rows), -(-codes.keys // cols)), np.int8)
    if kinds.size == 0:
        return kinds
    queries, keys = _QueryPieces.of(codes, rows), _KeyPieces.of(codes, cols)
    for first, last in _batches(queries.block_start, len(queries.a0), len(keys.first)):
        some, every = _compare(queries, keys, first, last)
        blocks = slice(first, last)
        kinds[blocks] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
    if codes.queries % rows:
        kinds[-1] = np.minimum(kinds[-1], PARTIAL)
    if codes.keys % cols:
        kinds[:, -1] = np.minimum(kinds[:, -1], PARTIAL)
    return kinds


def visited_pairs(kinds: Kinds, rows: int, cols: int) -> int:
    """(query, key) pairs inside the visited blocks: what a kernel computes, against `mask.visible_pairs`."""
    return int(np.count_nonzero(kinds)) * rows * cols


@dataclass(frozen=True)
class _QueryPieces:
    """Runs of queries of one block with equal a0, b0 and b1, and with a1 constant or counting up by one."""

    block_start: Index  # [B] first piece of each block
    a0: Int32  # [P]
    a1_least: Int32  # [P]
    a1_most: Int32  # [P]
    b0: Int32  # [P]
    b1: Int32  # [P]

    @staticmethod
    def of(codes: AttentionCodes, rows: int) -> "_QueryPieces":
        start, last = _runs([codes.a0, codes.b0, codes.b1], codes.a1, rows)
        a0, a1_least, b0, b1 = (bound[start] for bound in (codes.a0, codes.a1, codes.b0, codes.b1))
        return _QueryPieces(_first_of_blocks(start, rows), a0, a1_least, codes.a1[last], b0, b1)


@dataclass(frozen=True)
class _KeyPieces:
    """Runs of keys of one block, all public or all private, with codes constant or counting up by one."""

    block_start: Index  # [C] first piece of each block
    first: Int32  # [R] lowest code
    stop: Int32  # [R] highest code + 1

    @staticmethod
    def of(codes: AttentionCodes, cols: int) -> "_KeyPieces":
        start, last = _runs([codes.key_code >= PRIVATE], codes.key_code, cols)
        return _KeyPieces(_first_of_blocks(start, cols), codes.key_code[start], codes.key_code[last] + 1)


def _runs(constant: list[npt.NDArray], ramp: Int32, block: int) -> tuple[Index, Index]:
    """First and last index of the pieces: `constant` vectors do not change in them, and `ramp` has one step, 0 or 1."""
    cut = np.zeros(len(ramp), bool)
    cut[::block] = True
    step = np.diff(ramp)
    cut[1:] |= (step != 0) & (step != 1)
    for vector in constant:
        cut[1:] |= vector[1:] != vector[:-1]
    cut[2:] |= (step[1:] != step[:-1]) & ~cut[1:-1]
    start = np.flatnonzero(cut)
    return start, np.append(start[1:], len(ramp)) - 1


def _first_of_blocks(start: Index, block: int) -> Index:
    return np.flatnonzero(start % block == 0)


def _batches(block_start: Index, pieces: int, other_pieces: int) -> Iterator[tuple[int, int]]:
    """Ranges of query blocks with about `PAIRS_AT_ONCE` pairs of pieces each."""
    stop = np.append(block_start[1:], pieces)
    batch = stop * other_pieces // PAIRS_AT_ONCE
    borders = np.flatnonzero(np.diff(batch, prepend=-1, append=batch[-1] + 1))
    yield from zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)


def _compare(queries: _QueryPieces, keys: _KeyPieces, first: int, last: int) -> tuple[Bool, Bool]:
    """Whether any and whether all pairs of a block are visible, bool [last - first, C] each, for some query blocks.

    A covers public and B private codes, so the keys of a piece are all seen through A or all seen through B.
    """
    starts = queries.block_start[first:last]
    stop = queries.block_start[last] if last < len(queries.block_start) else len(queries.a0)
    pieces = slice(starts[0], stop)
    a0, a1_least, a1_most, b0, b1 = (
        bound[pieces, None] for bound in (queries.a0, queries.a1_least, queries.a1_most, queries.b0, queries.b1)
    )
    some = np.maximum(a0, keys.first) < np.minimum(a1_most, keys.stop)
    some |= np.maximum(b0, keys.first) < np.minimum(b1, keys.stop)
    every = (a0 <= keys.first) & (keys.stop <= a1_least)
    every |= (b0 <= keys.first) & (keys.stop <= b1)
    some = np.logical_or.reduceat(some, keys.block_start, axis=1)
    every = np.logical_and.reduceat(every, keys.block_start, axis=1)
    inside = starts - starts[0]
    return np.logical_or.reduceat(some, inside, axis=0), np.logical_and.reduceat(every, inside, axis=0)
