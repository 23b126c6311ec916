"""Random packs of segments, their mask by its plain definition, and its ranges; independent of the code under test."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from megabagel_kernels.attention.mask import PRIVATE, AttentionRanges


def examples(count: int) -> settings:
    """Settings of a property: so many examples, however slow the machine is at the moment."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Segment(NamedTuple):
    """`mode` is causal, full or noise. Noise segments of a sample that share `group` see each other entirely; with
    `chained`, they also see the groups of their sample's chain with a lower number."""

    length: int
    mode: str
    group: int = 0
    chained: bool = False


class Token(NamedTuple):
    sample: int
    split: int
    position: int
    mode: str
    group: int
    chained: bool


Pack = list[list[Segment]]


def tokens_of(pack: Pack) -> list[Token]:
    """All tokens in sequence order."""
    tokens: list[Token] = []
    for sample, segments in enumerate(pack):
        for index, split in enumerate(segments):
            start = len(tokens)
            places = range(start, start + split.length)
            tokens += [Token(sample, index, place, split.mode, split.group, split.chained) for place in places]
    return tokens


def sees(q: Token, k: Token) -> bool:
    """The mask in words (BAGEL section 2.3): whether query q sees key k."""
    if q.sample != k.sample:
        return False
    both_noise = q.mode == k.mode == "noise"
    same_image = both_noise and q.group == k.group
    same_split = q.split == k.split
    earlier_in_chain = both_noise and q.chained and k.chained and k.group < q.group
    if k.mode == "noise":
        return same_image or earlier_in_chain
    return q.position >= k.position or (same_split and q.mode == "full")


def definition(pack: Pack) -> npt.NDArray[np.bool_]:
    """bool [S, S] from `sees`, pair by pair."""
    tokens = tokens_of(pack)
    return np.array([[sees(q, k) for k in tokens] for q in tokens], bool).reshape(len(tokens), len(tokens))


def ranges_of(pack: Pack) -> AttentionRanges:
    """Codes by the table at the top of `attention/mask.py`, one token after the other."""
    tokens = tokens_of(pack)
    images = sorted({(t.sample, not t.chained, t.group) for t in tokens if t.mode == "noise"})  # chains first
    number = {(sample, group): PRIVATE + place for place, (sample, _, group) in enumerate(images)}
    sample_starts = {t.sample: t.position for t in reversed(tokens)}
    split_starts = {(t.sample, t.split): t.position for t in reversed(tokens)}
    chain_starts = {s: number[s, g] for s, alone, g in reversed(images) if not alone}
    rows = []
    for token in tokens:
        start, split_start = sample_starts[token.sample], split_starts[token.sample, token.split]
        if token.mode == "noise":
            own = number[token.sample, token.group]
            first = chain_starts[token.sample] if token.chained else own
            rows.append((own, start, split_start, first, own + 1))
        else:
            split_stop = split_start + pack[token.sample][token.split].length
            rows.append((token.position, start, token.position + 1 if token.mode == "causal" else split_stop, 0, 0))
    return AttentionRanges(*np.array(rows, np.int32).reshape(-1, 5).T)


@st.composite
def samples(draw: st.DrawFn, longest: int) -> list[Segment]:
    """One sample: texts, clean images, noised images alone, in groups or in one chain."""
    segments = []
    for _ in range(draw(st.integers(1, 6))):
        mode = draw(st.sampled_from(["causal", "causal", "full", "noise", "noise"]))
        group = draw(st.integers(0, 3)) if mode == "noise" else 0
        # Groups 0 and 1 are the sample's chain if it has one; groups 2 and 3 never belong to it.
        segments.append(Segment(draw(st.integers(1, longest)), mode, group))
    chained = draw(st.booleans())
    return [split._replace(chained=chained and split.mode == "noise" and split.group < 2) for split in segments]


@st.composite
def packs(draw: st.DrawFn, longest: int = 12, most: int = 5) -> Pack:
    """Packs of 1 to `most` samples with segments of 1 to `longest` tokens, sometimes after some equal images."""
    pack = draw(st.lists(samples(longest), min_size=1, max_size=most))
    image = Segment(draw(st.integers(1, longest)), "full")
    return [[image]] * draw(st.sampled_from([0, 0, 1, 2, 5])) + pack


@st.composite
def selections(draw: st.DrawFn, total: int) -> npt.NDArray[np.int64]:
    """Some tokens in some order: all in sequence order, all shuffled, or a part of them, possibly none."""
    kind = draw(st.sampled_from(["whole", "shuffled", "part"]))
    order = np.arange(total)
    if kind == "whole":
        return order
    shuffled = np.random.default_rng(draw(st.integers(0, 2**32))).permutation(order)
    return shuffled if kind == "shuffled" else shuffled[: draw(st.integers(0, total))]
