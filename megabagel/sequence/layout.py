"""Compact [und | gen] layout of a pack, dealt to context-parallel ranks (docs/architecture.md#five-ideas).

Shape letters: docs/notation.md. Here T is the number of rows of one rank, K that of all ranks together.

Rows are handed out in chunks of one kind. Every rank holds the same number of rows, und chunks first, and at least one
chunk of either kind, so that each expert always has rows to run on; only the border between the two moves. Padding rows
carry code -1 and see nothing.
"""

from dataclasses import dataclass

import numpy as np
from megabagel_kernels.attention.mask import AttentionRanges

from megabagel.errors import UserError
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import deal
from megabagel.sequence.sample import LATENT


def layout_rows(max_tokens: int, chunk: int, cp: int) -> int:
    """K for packs of at most `max_tokens`: a constant of the run, whatever the und/gen segment of a pack."""
    unit = chunk * cp
    return -(-max_tokens // unit) * unit + unit


@dataclass(frozen=True)
class Layout:
    """Where every token of a pack lies.

    token_K (int64): sequence index per row, -1 for padding; rank r owns rows [r * T, (r + 1) * T).
    num_und: und rows at the start of each rank's share, a multiple of the chunk.
    """

    token_K: np.ndarray
    num_und: tuple[int, ...]

    @property
    def cp(self) -> int:
        """Ranks that share the pack."""
        return len(self.num_und)

    @property
    def rows(self) -> int:
        """T, rows per rank."""
        return len(self.token_K) // self.cp

    def rank(self, index: int) -> np.ndarray:
        """token_T of one rank."""
        return self.token_K[index * self.rows : (index + 1) * self.rows]

    def split(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(und, gen) rows of one rank."""
        token_T, num_und = self.rank(index), self.num_und[index]
        return token_T[:num_und], token_T[num_und:]

    def codes(self, pack: Pack, index: int) -> AttentionRanges:
        """Mask integers for the queries of one rank and the keys of all ranks, in row order."""
        query = self.rank(index)
        of_query = (np.where(query >= 0, bound[query], 0).astype(np.int32) for bound in pack.codes.of_queries)
        key_code = np.where(self.token_K >= 0, pack.codes.key_code[self.token_K], -1).astype(np.int32)
        return AttentionRanges(key_code, *of_query)


def build_layout(pack: Pack, rows: int, chunk: int, cp: int) -> Layout:
    """Lay a pack out on `cp` ranks with `rows` rows in all (see `layout_rows`).

    Chunks are dealt by the number of keys their queries see, so that ranks do equal work in attention; row counts are
    equal by construction.
    """
    assert rows % (chunk * cp) == 0, (rows, chunk, cp)
    und, gen = np.flatnonzero(pack.kind_S != LATENT), _generation_order(pack)
    total = rows // chunk
    und_chunks = max(cp, -(-len(und) // chunk))
    gen_chunks = max(cp, -(-len(gen) // chunk))
    if und_chunks + gen_chunks > total:
        raise UserError(f"a pack of {len(und)} und and {len(gen)} gen tokens does not fit into {rows} rows")
    und_chunks = total - gen_chunks  # spare chunks are und padding: any choice costs the same
    chunks = np.concatenate([_padded(und, und_chunks * chunk), _padded(gen, gen_chunks * chunk)]).reshape(total, chunk)
    visible = np.append(pack.visible_S, 0)  # index -1 (padding) sees nothing
    area = visible[chunks].sum(1)
    shares = _deal_both_kinds(area[:und_chunks], area[und_chunks:], cp)
    token_K = np.concatenate([chunks[und_part + gen_part].ravel() for und_part, gen_part in shares])
    return Layout(token_K, tuple(len(und_part) * chunk for und_part, _ in shares))


def _generation_order(pack: Pack) -> np.ndarray:
    """Latent tokens, clean before noised inside each sample: noised keys serve few queries, so they lie together."""
    gen = np.flatnonzero(pack.kind_S == LATENT)
    return gen[np.lexsort((gen, pack.noised_S[gen], pack.sample_S[gen]))]


def _padded(tokens: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([tokens, np.full(rows - len(tokens), -1, np.int64)])


def _deal_both_kinds(und_area: np.ndarray, gen_area: np.ndarray, cp: int) -> list[tuple[list[int], list[int]]]:
    """Chunk numbers (und, gen) per rank; every rank gets at least one of each and the same number in all.

    Shares of gen chunks are about equal, else light ones would fill a rank and keep heavy und chunks off it.
    """
    per_rank = (len(und_area) + len(gen_area)) // cp
    gen_parts = deal(gen_area.tolist(), cp, capacity=min(per_rank - 1, -(-len(gen_area) // cp) + 1))
    gen_parts = _lend_to_empty(gen_parts)
    room = [per_rank - len(part) for part in gen_parts]
    load = [float(gen_area[part].sum()) for part in gen_parts]
    und_parts: list[list[int]] = [[] for _ in range(cp)]
    for index in np.argsort(-und_area, kind="stable"):
        rank = min((r for r in range(cp) if len(und_parts[r]) < room[r]), key=lambda r: (load[r], r))
        und_parts[rank].append(int(index))
        load[rank] += float(und_area[index])
    return [
        (sorted(und), [len(und_area) + index for index in gen]) for und, gen in zip(und_parts, gen_parts, strict=True)
    ]


def _lend_to_empty(parts: list[list[int]]) -> list[list[int]]:
    """Move one item from the fullest part to each empty one."""
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts
