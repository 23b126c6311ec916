"""New tokens of one forward pass in NumPy: visible cache rows, rows to write, and layout over context-parallel ranks.

A segment is a run of new tokens of one context under one rule of attention. A part is a set of segments with an
attention plan of its own: all guidance branches of one picture, or one decoded token. Plans never span parts, so what a
request computes does not depend on the requests beside it.

Letters: P past cache rows, n new tokens of a segment; T rows of this rank, K keys of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from megabagel_kernels.attention.mask import PRIVATE, AttentionRanges

from megabagel.inference.contexts import Content, TextContent
from megabagel.inference.placement import Shape
from megabagel.sampling.taylorseer import TaylorSeer
from megabagel.sequence.sample import LATENT, TEXT


@dataclass(frozen=True, eq=False)
class Segment:
    """New tokens at the end of a context."""

    past: np.ndarray
    """int64 [P] cache rows of the context, in order."""
    slots: np.ndarray
    """int64 [n] cache rows that take the new keys and values."""
    kind: np.ndarray
    """uint8 [n] TEXT, VIT or LATENT."""
    ids: np.ndarray
    """int64 [n] token ids; 0 where the token is no text."""
    position: np.ndarray
    """int64 [n] rotary ids."""
    causal: bool
    """Text: a token sees those before it; images: all tokens see each other."""
    grid: tuple[int, int] | None = None
    """Rows and columns of an image."""
    logits: bool = False
    """Whether the next-token logits after the last token are wanted."""


def segment(
    content: Content,
    past: np.ndarray,
    slots: np.ndarray,
    position: int,
    delimiters: tuple[int, int],
    logits: bool = False,
) -> Segment:
    """The segment that appends a content to a context.

    Args:
        content: text or image.
        past: int64 [P] cache rows of the context.
        slots: int64 [n] rows for the new tokens.
        position: the context's next rotary id.
        delimiters: ids of start- and end-of-image.
        logits: whether to predict the token after it.
    """
    n = content.tokens
    assert len(slots) == n
    if isinstance(content, TextContent):
        ids, kind = np.array(content.ids, np.int64), np.full(n, TEXT, np.uint8)
        return Segment(past, slots, kind, ids, position + np.arange(n), causal=True, logits=logits)
    ids, kind = np.zeros(n, np.int64), np.full(n, content.kind, np.uint8)
    ids[[0, -1]], kind[[0, -1]] = delimiters, TEXT
    where = np.full(n, position, np.int64)
    return Segment(past, slots, kind, ids, where, causal=False, grid=(content.rows, content.cols), logits=logits)


@dataclass(frozen=True, eq=False)
class Layout:
    """Segments that share an attention plan. Reused by all steps that differ only in their latents."""

    segments: tuple[Segment, ...]
    plans: dict[tuple[int, int], Any] = field(default_factory=dict)
    """The runner's attention plan by (context-parallel rank, size)."""

    @cached_property
    def tokens(self) -> int:
        """New tokens."""
        return sum(len(segment.slots) for segment in self.segments)

    def joined(self, name: str) -> np.ndarray:
        """A per-token array of all segments, end to end."""
        return np.concatenate([getattr(segment, name) for segment in self.segments])

    @cached_property
    def kind(self) -> np.ndarray:
        """Kind of every token."""
        return self.joined("kind")

    @cached_property
    def wanted(self) -> np.ndarray:
        """Tokens after which logits are wanted (int64)."""
        ends = np.cumsum([len(segment.slots) for segment in self.segments]) - 1
        return ends[[segment.logits for segment in self.segments]]

    @cached_property
    def shape(self) -> Shape:
        """Key of the placement of its tokens among the rows of a pass."""
        return self.kind.tobytes(), tuple(int(token) for token in self.wanted)

    @cached_property
    def pictures(self) -> tuple[int, ...]:
        """Latent tokens of every image that has them."""
        grids = [one.grid for one in self.segments if one.grid and one.kind[1] == LATENT]
        return tuple(rows * cols for rows, cols in grids)

    @cached_property
    def latents(self) -> int:
        """Latent tokens."""
        return sum(self.pictures)

    @cached_property
    def mask(self) -> tuple[np.ndarray, AttentionRanges]:
        """(cache rows of the keys [K], mask integers of all tokens in order)."""
        return mask_codes(self.segments)


def _one_segment(segment: Segment) -> tuple[np.ndarray, AttentionRanges]:
    """As `mask_codes` of one segment, without its search: a decoded token is planned anew each time."""
    past, own = len(segment.past), len(segment.slots)
    stop = past + (np.arange(1, own + 1) if segment.causal else np.full(own, own))
    none, codes = np.zeros(own, np.int32), np.arange(past + own, dtype=np.int32)
    keys = np.concatenate([segment.past, segment.slots])
    return keys, AttentionRanges(codes, none, stop.astype(np.int32), none, none)


def mask_codes(segments: Sequence[Segment]) -> tuple[np.ndarray, AttentionRanges]:
    """Cache rows visible to the segments, and the range of key codes that each new token sees.

    A context is an interval of public codes. A context that is a prefix of a longer one is a prefix of that interval,
    so a text-free context adds no keys; the new tokens of such a branch get private codes.
    """
    if len(segments) == 1:
        return _one_segment(segments[0])
    chains: list[np.ndarray] = []
    starts: list[int] = []
    bounds: dict[int, tuple[int, bool]] = {}  # segment -> (first public code of its context, own keys are private)
    for index in sorted(range(len(segments)), key=lambda i: -len(segments[i].past) - len(segments[i].slots)):
        whole = np.concatenate([segments[index].past, segments[index].slots])
        found = _chain_of(whole, chains)
        private = (
            found is None and len(segments[index].past) > 0 and _chain_of(segments[index].past, chains) is not None
        )
        if private:
            found = _chain_of(segments[index].past, chains)
        if found is None:
            found = len(chains)
            starts.append(sum(map(len, chains)))
            chains.append(whole)
        bounds[index] = starts[found], private
    keys, codes = [*chains], [np.arange(sum(map(len, chains)), dtype=np.int32)]
    limits, next_private = [], PRIVATE
    for index, segment in enumerate(segments):
        start, private = bounds[index]
        past, own = len(segment.past), len(segment.slots)
        seen = np.arange(1, own + 1) if segment.causal else np.full(own, own)
        zero = np.zeros(own, np.int64)
        if private:
            keys.append(segment.slots)
            codes.append(np.arange(next_private, next_private + own, dtype=np.int32))
            limits.append((zero + start, zero + start + past, zero + next_private, next_private + seen))
            next_private += own
        else:
            limits.append((zero + start, start + past + seen, zero, zero))
    a0, a1, b0, b1 = (np.concatenate(bound).astype(np.int32) for bound in zip(*limits, strict=True))
    return np.concatenate(keys), AttentionRanges(np.concatenate(codes), a0, a1, b0, b1)


def _chain_of(rows: np.ndarray, chains: Sequence[np.ndarray]) -> int | None:
    """Number of the chain that begins with `rows`."""
    return next((i for i, chain in enumerate(chains) if np.array_equal(chain[: len(rows)], rows)), None)


@dataclass(frozen=True, eq=False)
class Part:
    """A layout with its images and timesteps: the share of a request in one forward pass."""

    layout: Layout
    images: tuple[Any, ...] = ()
    """Patches or latent tokens (tensors) of every segment that is an image, in order."""
    times: tuple[float, ...] = ()
    """Timestep of each of these; 0 for clean latents, ignored for patches."""
    seer: TaylorSeer | None = None
    """Keeps the features of this part, a single branch, or extrapolates them instead of computing."""
    evaluation: int = 0
    """Number of this evaluation among those of the branch; for `seer`."""
