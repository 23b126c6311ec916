"""[und | gen] layout of a pack: rows grouped by expert and split over context-parallel ranks.

Each expert's rows are contiguous, so that a layer runs dense GEMMs without gather or scatter
(docs/architecture.md#five-ideas). Rows are assigned in blocks of `parallel.chunk` rows of one expert. Every rank holds
the same number of rows, understanding ("und") blocks first, and at least one block of each expert, so that both experts
run in every step; only `num_und`, the number of und rows, varies between packs and ranks. Padding rows have mask code
-1: they see nothing and are not seen.

Shape letters: docs/notation.md. T is the number of rows of one rank, K that of all ranks together.
"""

from dataclasses import dataclass

import numpy as np
from megabagel_kernels.attention.mask import AttentionRanges

from megabagel.errors import UserError
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import deal
from megabagel.sequence.sample import LATENT


def layout_rows(max_tokens: int, chunk: int, cp: int) -> int:
    """Return K for packs of at most `max_tokens` tokens: a constant of the run, whatever a pack's share of gen tokens.

    Pipeline stages can therefore exchange tensors of constant shape.
    """
    # The spare unit is one row block per rank. Padding und and gen tokens separately takes at most one row block more
    # than padding them together, and an expert without tokens still takes one row block on every rank.
    unit = chunk * cp
    return -(-max_tokens // unit) * unit + unit


@dataclass(frozen=True)
class Layout:
    """Assignment of the tokens of a pack to rows of context-parallel ranks."""

    token_K: np.ndarray
    """int64 sequence index of each row's token, -1 for padding; rank r owns rows [r * T, (r + 1) * T)."""
    num_und: tuple[int, ...]
    """Per rank, the number of und rows at the start of its rows; a multiple of `parallel.chunk`."""

    @property
    def cp(self) -> int:
        """Number of context-parallel ranks that share the pack."""
        return len(self.num_und)

    @property
    def rows(self) -> int:
        """T, the number of rows per rank."""
        return len(self.token_K) // self.cp

    def rank(self, index: int) -> np.ndarray:
        """Return token_T of one rank: its part of `token_K`."""
        return self.token_K[index * self.rows : (index + 1) * self.rows]

    def split(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (und, gen): token_U and token_G of one rank."""
        token_T, num_und = self.rank(index), self.num_und[index]
        return token_T[:num_und], token_T[num_und:]

    def codes(self, pack: Pack, index: int) -> AttentionRanges:
        """Return the attention ranges of one rank's queries over the keys of all ranks, in row order."""
        query = self.rank(index)
        of_query = (np.where(query >= 0, bound[query], 0).astype(np.int32) for bound in pack.codes.of_queries)
        key_code = np.where(self.token_K >= 0, pack.codes.key_code[self.token_K], -1).astype(np.int32)
        return AttentionRanges(key_code, *of_query)


def build_layout(pack: Pack, rows: int, chunk: int, cp: int) -> Layout:
    """Lay a pack out on context-parallel ranks.

    Row blocks are balanced by the number of keys their queries see, that is by attention work. Row counts are equal by
    construction, so all other work of a layer is balanced anyway.

    Args:
        pack: the samples, in sequence order.
        rows: K, rows of all ranks together (see `layout_rows`).
        chunk: rows of a block, `parallel.chunk`.
        cp: number of context-parallel ranks.

    Raises:
        UserError: the pack has more tokens than fit.
    """
    assert rows % (chunk * cp) == 0, (rows, chunk, cp)
    und, gen = np.flatnonzero(pack.kind_S != LATENT), _generation_order(pack)
    total = rows // chunk
    und_chunks = max(cp, -(-len(und) // chunk))
    gen_chunks = max(cp, -(-len(gen) // chunk))
    if und_chunks + gen_chunks > total:
        raise UserError(f"a pack of {len(und)} und and {len(gen)} gen tokens does not fit into {rows} rows")
    # Spare blocks become und padding; both experts cost the same per row, so any choice would do.
    und_chunks = total - gen_chunks
    chunks = np.concatenate([_padded(und, und_chunks * chunk), _padded(gen, gen_chunks * chunk)]).reshape(total, chunk)
    # The appended 0 is what index -1 (padding) reads: padding rows see no keys.
    visible = np.append(pack.visible_S, 0)
    area = visible[chunks].sum(1)
    shares = _deal_both_kinds(area[:und_chunks], area[und_chunks:], cp)
    token_K = np.concatenate([chunks[und_part + gen_part].ravel() for und_part, gen_part in shares])
    return Layout(token_K, tuple(len(und_part) * chunk for und_part, _ in shares))


def _generation_order(pack: Pack) -> np.ndarray:
    """Return the latent tokens, clean ones before noised ones inside each sample."""
    # Noised keys are visible to few queries. Kept together they fill whole key blocks, which the attention schedule
    # skips for most queries (docs/kernels.md#attention). The mask does not depend on the order of rows.
    gen = np.flatnonzero(pack.kind_S == LATENT)
    return gen[np.lexsort((gen, pack.noised_S[gen], pack.sample_S[gen]))]


def _padded(tokens: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([tokens, np.full(rows - len(tokens), -1, np.int64)])


def _deal_both_kinds(und_area: np.ndarray, gen_area: np.ndarray, cp: int) -> list[tuple[list[int], list[int]]]:
    """Assign row blocks to ranks: at least one of each expert per rank, and the same number of blocks in all.

    Args:
        und_area: (query, key) pairs of every und block.
        gen_area: the same of every gen block.
        cp: number of context-parallel ranks.

    Returns:
        Per rank the block numbers (und, gen); gen blocks are numbered after all und blocks.
    """
    per_rank = (len(und_area) + len(gen_area)) // cp
    # The capacity keeps numbers of gen blocks about equal. Balanced by area alone, many light gen blocks would fill up
    # one rank and leave it no room for heavy und blocks.
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
    """Move one block from the fullest part to each empty one, so that every rank runs both experts."""
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts
