"""Rows of a forward pass on one rank: where the tokens of all parts lie, [und | gen], in NumPy.

A placement depends on the kinds of the tokens only, so the steps of a picture, or of a text, share one.

Letters: T = U + G rows of this rank, W rows of all context-parallel ranks, Q rows with logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabagel.sequence.sample import LATENT, TEXT, VIT

Shape = tuple[bytes, tuple[int, ...]]
"""Kinds of a part's tokens, and those after which logits are wanted."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Token numbers count the tokens of all parts, end to end; -1 is padding."""

    token_T: np.ndarray
    """Token of each row."""
    token_W: np.ndarray
    """The same for the rows of all context-parallel ranks, end to end."""
    und: int
    """Rows of the understanding expert."""
    gen: int
    """Rows of the generation expert, as `und`."""
    real_gen: int
    """Gen rows without those that fill up."""
    is_text_U: np.ndarray
    vit_U: np.ndarray
    """Number of each row's patch among all; -1 for others."""
    latent_G: np.ndarray
    """Number of each row's latent token among all; -1 for padding."""
    of_part: tuple[np.ndarray, ...]
    """Rows with the tokens of each part, und before gen."""
    logits_Q: np.ndarray
    """Rows of this rank whose logits are wanted."""
    logits_at: np.ndarray
    """Their numbers among those of all ranks."""


def share_of(kind: np.ndarray, generation: bool, rank: int, size: int) -> np.ndarray:
    """Token numbers of one expert that a context-parallel rank computes; -1 pads to equal shares.

    Args:
        kind: uint8, of every token.
        generation: which expert.
        rank: context-parallel rank.
        size: number of such ranks.
    """
    mine = np.flatnonzero((kind == LATENT) == generation)
    rows = -(-len(mine) // size)
    padded = np.concatenate([mine, np.full(rows * size - len(mine), -1, np.int64)])
    return padded[rank * rows : (rank + 1) * rows]


def place(shapes: Sequence[Shape], rank: int, size: int, least: int) -> Placement:
    """Place the tokens of all parts on a context-parallel rank.

    Args:
        shapes: of the parts, in order.
        rank: context-parallel rank.
        size: number of such ranks.
        least: rows that an expert with fewer, but any, is filled up to.
    """
    kinds = [np.frombuffer(kind, np.uint8) for kind, _ in shapes]
    starts = np.cumsum([0, *map(len, kinds)])[:-1]
    shares = [[[share_of(kind, gen, r, size) for kind in kinds] for gen in (False, True)] for r in range(size)]
    real_und, real_gen = (sum(map(len, of_expert)) for of_expert in shares[rank])
    und, gen = (max(rows, least) if rows else 0 for rows in (real_und, real_gen))
    token_W = np.concatenate([
        _padded([np.where(own >= 0, own + start, -1) for own, start in zip(of_expert, starts, strict=True)], rows)
        for of_rank in shares
        for of_expert, rows in zip(of_rank, (und, gen), strict=True)
    ])  # fmt: skip
    token_T = token_W[rank * (und + gen) : (rank + 1) * (und + gen)]
    kind = np.concatenate([*kinds, np.full(1, 255, np.uint8)])  # of padding
    number = {k: np.cumsum(kind == k) - 1 for k in (VIT, LATENT)}
    token_U, token_G = token_T[:und], token_T[und:]
    row_of = {int(token): row for row, token in enumerate(token_U) if token >= 0}
    wanted = [int(start) + w for (_, of_part), start in zip(shapes, starts, strict=True) for w in of_part]
    here = [i for i, token in enumerate(wanted) if token in row_of]
    return Placement(
        token_T,
        token_W,
        und,
        gen,
        real_gen,
        is_text_U=kind[token_U] == TEXT,
        vit_U=np.where(kind[token_U] == VIT, number[VIT][token_U], -1),
        latent_G=np.where(kind[token_G] == LATENT, number[LATENT][token_G], -1),
        of_part=_rows_of_parts(shares[rank][0], shares[rank][1], und),
        logits_Q=np.array([row_of[wanted[i]] for i in here], np.int64),
        logits_at=np.array(here, np.int64),
    )


def _padded(tokens: Sequence[np.ndarray], rows: int) -> np.ndarray:
    found = np.concatenate([np.zeros(0, np.int64), *tokens])
    return np.concatenate([found, np.full(rows - len(found), -1, np.int64)])


def _rows_of_parts(of_und: Sequence[np.ndarray], of_gen: Sequence[np.ndarray], und: int) -> tuple[np.ndarray, ...]:
    found, at_und, at_gen = [], 0, und
    for own_und, own_gen in zip(of_und, of_gen, strict=True):
        found.append(np.concatenate([at_und + np.flatnonzero(own_und >= 0), at_gen + np.flatnonzero(own_gen >= 0)]))
        at_und, at_gen = at_und + len(own_und), at_gen + len(own_gen)
    return tuple(found)
