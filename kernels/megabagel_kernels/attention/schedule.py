"""Which blocks of the score matrix a kernel visits, and which of them need no mask (FlexAttention's BlockMask).

The score matrix of T queries and K keys is cut into blocks of `rows` x `cols`. A block without a visible pair is empty
and absent from the lists, a block of visible pairs only is full, any other block is partial and needs the mask.

The classes are exact, although no T x S matrix is made (FlexAttention's `create_block_mask` evaluates the mask for
every pair; measured in docs/kernels.md). Queries and keys are cut into *pieces*: runs of tokens within a block whose
ranges or codes are constant or count up by one. Whether any or all pairs of two pieces are visible is then a comparison
of a few integers. Tokens may be in any order; the more neighbours differ, the more pieces, up to one per token.

Letters: T queries, K keys. Shapes in words: [query blocks, key blocks], [query pieces], [key pieces].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megabagel_kernels.attention.mask import PRIVATE, AttentionRanges

EMPTY, PARTIAL, FULL = 0, 1, 2

PARTIAL_COST = 1.3
"""Time of a partial block in full blocks, an estimate; only the order of processing depends on it."""

PAIRS_AT_ONCE = 2**22
"""Pairs of pieces that are compared at once: bounds the memory for tokens in random order."""

Index = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each block of one side (queries or keys), the blocks of the other side that it visits.

    `work[i] = (block, full_start, full_stop, partial_start, partial_stop)`: `block` visits the full blocks
    `blocks[full_start:full_stop]` and the partial blocks `blocks[partial_start:partial_stop]`. Rows of `work` are
    sorted heaviest block first, so that the last programs of a launch are short. A block that visits nothing has a row
    too: its output has to be written. `blocks` ends with one unused entry, because kernels read one entry ahead.
    """

    work: Int32  # [blocks, 5]
    blocks: Int32  # [visited + 1]

    @staticmethod
    def of(kinds: Kinds) -> "BlockLists":
        """Lists of the rows of a matrix of kinds; pass the transposed matrix for those of its columns."""
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


def classify(ranges: AttentionRanges, rows: int, cols: int) -> Kinds:
    """EMPTY, PARTIAL or FULL for each block of `rows` queries x `cols` keys: int8 [ceil(T / rows), ceil(S / cols)].

    A last block that is cut short by T or S is never FULL: the kernel needs the mask to exclude what is beyond the end.
    """
    kinds = np.zeros((-(-ranges.queries // rows), -(-ranges.keys // cols)), np.int8)
    if kinds.size == 0:
        return kinds
    queries, keys = _QueryPieces.of(ranges, rows), _KeyPieces.of(ranges, cols)
    for first, last in _batches(queries.block_start, len(queries.public_start), len(keys.first)):
        some, every = _compare(queries, keys, first, last)
        blocks = slice(first, last)
        kinds[blocks] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
    if ranges.queries % rows:
        kinds[-1] = np.minimum(kinds[-1], PARTIAL)
    if ranges.keys % cols:
        kinds[:, -1] = np.minimum(kinds[:, -1], PARTIAL)
    return kinds


def visited_pairs(kinds: Kinds, rows: int, cols: int) -> int:
    """(query, key) pairs inside visited blocks, which a kernel computes; `mask.visible_pairs` are the useful ones."""
    return int(np.count_nonzero(kinds)) * rows * cols


@dataclass(frozen=True)
class _QueryPieces:
    """Runs of queries of one block with equal ranges, except that public_stop may count up by one (causal text)."""

    block_start: Index  # [query blocks] first piece of each
    public_start: Int32  # [query pieces], as all below
    least_public_stop: Int32
    most_public_stop: Int32
    private_start: Int32
    private_stop: Int32

    @staticmethod
    def of(ranges: AttentionRanges, rows: int) -> "_QueryPieces":
        constant = [ranges.public_start, ranges.private_start, ranges.private_stop]
        first, last = _runs(constant, ranges.public_stop, rows)
        start, stop, private_start, private_stop = (bound[first] for bound in ranges.of_queries)
        most = ranges.public_stop[last]
        return _QueryPieces(_first_of_blocks(first, rows), start, stop, most, private_start, private_stop)


@dataclass(frozen=True)
class _KeyPieces:
    """Runs of keys of one block, all public or all private, with codes constant or counting up by one."""

    block_start: Index  # [key blocks] first piece of each
    first: Int32  # [key pieces] lowest code
    stop: Int32  # [key pieces] highest code + 1

    @staticmethod
    def of(ranges: AttentionRanges, cols: int) -> "_KeyPieces":
        start, last = _runs([ranges.key_code >= PRIVATE], ranges.key_code, cols)
        return _KeyPieces(_first_of_blocks(start, cols), ranges.key_code[start], ranges.key_code[last] + 1)


def _runs(constant: list[npt.NDArray], ramp: Int32, block: int) -> tuple[Index, Index]:
    """First and last index of each piece: `constant` vectors do not change in it, `ramp` has one step, 0 or 1."""
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
    """Ranges [first, last) of query blocks with about `PAIRS_AT_ONCE` pairs of pieces each."""
    stop = np.append(block_start[1:], pieces)
    batch = stop * other_pieces // PAIRS_AT_ONCE
    borders = np.flatnonzero(np.diff(batch, prepend=-1, append=batch[-1] + 1))
    yield from zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)


def _compare(queries: _QueryPieces, keys: _KeyPieces, first: int, last: int) -> tuple[Bool, Bool]:
    """Whether any and whether all pairs of a block are visible, bool [last - first, key blocks] each.

    Keys of a piece are all public or all private, so a query sees all of them through one of its two ranges.
    """
    starts = queries.block_start[first:last]
    stop = queries.block_start[last] if last < len(queries.block_start) else len(queries.public_start)
    pieces = slice(starts[0], stop)
    start, least_stop, most_stop = (
        bound[pieces, None] for bound in (queries.public_start, queries.least_public_stop, queries.most_public_stop)
    )
    private_start, private_stop = queries.private_start[pieces, None], queries.private_stop[pieces, None]
    some = np.maximum(start, keys.first) < np.minimum(most_stop, keys.stop)
    some |= np.maximum(private_start, keys.first) < np.minimum(private_stop, keys.stop)
    every = (start <= keys.first) & (keys.stop <= least_stop)
    every |= (private_start <= keys.first) & (keys.stop <= private_stop)
    some = np.logical_or.reduceat(some, keys.block_start, axis=1)
    every = np.logical_and.reduceat(every, keys.block_start, axis=1)
    inside = starts - starts[0]
    return np.logical_or.reduceat(some, inside, axis=0), np.logical_and.reduceat(every, inside, axis=0)
