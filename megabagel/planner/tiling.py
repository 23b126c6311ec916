"""Tiling check: do shards cover every tensor exactly once? Pure arithmetic on intervals and n-d slices.

There are two levels. The ranks with the same weights split each local parameter into flat ranges, and the local
parameters of all model-parallel ranks are slices of the whole model's tensors. Every gap or overlap is one line.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from megabagel.model.sharding import Piece


class Interval(NamedTuple):
    """Numbers [start, stop) that a rank owns."""

    rank: int
    start: int
    stop: int


def holes(what: str, size: int, intervals: Sequence[Interval]) -> Iterator[str]:
    """Gaps and overlaps of intervals that should tile [0, size)."""
    at, before = 0, "the start"
    for interval in sorted(intervals, key=lambda i: (i.start, i.stop)):
        if interval.start != at:
            kind = "a gap" if interval.start > at else "an overlap"
            yield f"{what}: {kind} between {before} and rank {interval.rank} ([{at}, {interval.start}))"
        at, before = interval.stop, f"rank {interval.rank}"
    if at != size:
        yield f"{what}: {before} ends at {at}, expected {size}"


def whole_tensors(
    expected: Mapping[str, tuple[int, ...]], held: Sequence[tuple[int, int, Sequence[Piece]]]
) -> Iterator[str]:
    """Problems of the pieces that each (pp rank, tp rank) holds, compared with the tensors of the whole model.

    A tensor lies on one pipeline rank; there, either every tensor-parallel rank holds all of it, or their parts follow
    one another along one dimension.
    """
    by_name: dict[str, list[tuple[int, int, Piece]]] = {}
    for pp_rank, tp_rank, pieces in held:
        for piece in pieces:
            by_name.setdefault(piece.name, []).append((pp_rank, tp_rank, piece))
    yield from (f"{name}: no rank holds it" for name in expected.keys() - by_name.keys())
    tp = {tp_rank for _, tp_rank, _ in held}
    for name, parts in by_name.items():
        if name not in expected:
            yield f"{name}: held, but the whole model has no such tensor"
        else:
            yield from _one_tensor(name, expected[name], parts, tp)


def _one_tensor(name: str, shape: tuple[int, ...], parts: list[tuple[int, int, Piece]], tp: set[int]) -> Iterator[str]:
    stages = sorted({pp_rank for pp_rank, _, _ in parts})
    if len(stages) > 1:
        yield f"{name}: held by pipeline ranks {stages}, expected one"
    ranks = sorted(tp_rank for _, tp_rank, _ in parts)
    if ranks != sorted(tp):
        yield f"{name}: held by tensor-parallel ranks {ranks}, expected each of {sorted(tp)} once"
    shapes = {piece.shape for _, _, piece in parts}
    if shapes != {shape}:
        yield f"{name}: ranks take it for {sorted(shapes)}, the whole model has {shape}"
        return
    replicated = {piece.replicated for _, _, piece in parts}
    if len(replicated) > 1:
        yield f"{name}: replicated for some tensor-parallel ranks and split for others"
    elif replicated == {True}:
        yield from (
            f"{name}: rank {rank} holds a part of it, expected all" for _, rank, p in parts if p.length != shape[p.dim]
        )
    else:
        dim = parts[0][2].dim
        intervals = [Interval(rank, p.offset[dim], p.offset[dim] + p.length) for _, rank, p in parts]
        yield from holes(f"{name} along dimension {dim} over tensor-parallel ranks", shape[dim], intervals)
