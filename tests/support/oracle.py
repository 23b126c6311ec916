"""The rules of the sequence, token by token, to judge the code by (docs/bagel.md#samples, #rope, #mask).

Everything here is a loop or a comparison over single tokens. Nothing is shared with the code under test but the items.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from megabagel.sequence.items import Clip, Item, Latent, Mode, Text, Vit


class Token(NamedTuple):
    """One token of a sample."""

    kind: str
    """word, patch or latent."""
    position: int
    """RoPE id."""
    word: str
    """What the token says, for words: bos, eos, soi, eoi or "SLOT:NUMBER" of the text."""
    label: str
    """The word that the row must predict; empty: none."""
    flow: bool
    """Whether the row bears flow loss."""
    segment: int
    mode: Mode
    chain: int | None
    image: tuple[int, int]
    """(slot, row-major place) of a patch or latent."""


def tokens_of(items: Sequence[Item], dropped: Collection[int] = (), advance_dropped: bool = True) -> list[Token]:
    """The tokens of a sample whose items with the numbers in `dropped` are left out."""
    tokens: list[Token] = []
    counter = 0
    for number, item in enumerate(items):
        if number in dropped:
            counter += 0 if isinstance(item, Text) or not advance_dropped else 1
        elif isinstance(item, Text):
            tokens += _text(item, number, counter)
            counter += item.length + 2
        elif isinstance(item, Clip):
            mode = clip_mode(item)
            for frame, step in zip(item.frames, item.steps, strict=True):
                tokens += _image(frame, number, mode, item.chain, counter)
                counter += _moves(frame) if step is None else step
        else:
            generated = isinstance(item, Latent) and item.noised
            tokens += _image(item, number, Mode.NOISE if generated else Mode.FULL, None, counter)
            counter += _moves(item)
    return tokens


def _text(item: Text, segment: int, counter: int) -> list[Token]:
    words = ["bos", *(f"{item.slot}:{i}" for i in range(item.length)), "eos"]
    labels = [*words[1:], ""] if item.loss else [""] * len(words)
    return [
        Token("word", counter + i, word, label, False, segment, Mode.CAUSAL, None, (-1, -1))
        for i, (word, label) in enumerate(zip(words, labels, strict=True))
    ]


def _image(image: Vit | Latent, segment: int, mode: Mode, chain: int | None, counter: int) -> list[Token]:
    generated = isinstance(image, Latent) and image.noised
    kind = "latent" if isinstance(image, Latent) else "patch"
    content = [
        Token(kind, counter, "", "", generated, segment, mode, chain, (image.slot, row * image.cols + col))
        for row in range(image.rows)
        for col in range(image.cols)
    ]
    soi, eoi = (Token("word", counter, w, "", False, segment, mode, chain, (-1, -1)) for w in ("soi", "eoi"))
    return [soi, *content, eoi]


def _moves(image: Vit | Latent) -> int:
    """How far the counter moves after an image: not at all if it is generated, so that its clean copy has its id."""
    return 0 if isinstance(image, Latent) and image.noised else 1


def clip_mode(clip: Clip) -> Mode:
    """A group of diffusion forcing is hidden; without it the first frame decides (docs/bagel.md#samples)."""
    if clip.chain is not None:
        return Mode.NOISE
    return Mode.NOISE if clip.frames[0].noised and clip.steps[0] is None else Mode.FULL


class Place(NamedTuple):
    """Where a token stands as far as attention is concerned."""

    sample: int
    segment: int
    mode: Mode
    chain: int | None


def places_of(samples: Sequence[Sequence[Token]]) -> list[Place]:
    """Places of the tokens of a pack."""
    return [Place(i, t.segment, t.mode, t.chain) for i, sample in enumerate(samples) for t in sample]


def sees(q: int, k: int, places: Sequence[Place]) -> bool:
    """Whether the token at q sees the one at k (docs/bagel.md#mask; BAGEL section 2.3 for chains)."""
    query, key = places[q], places[k]
    if query.sample != key.sample:
        return False
    same_segment = query.segment == key.segment
    reaches = q >= k or (same_segment and query.mode in (Mode.FULL, Mode.NOISE))
    if key.mode is not Mode.NOISE:
        return reaches
    earlier_of_chain = query.mode is Mode.NOISE and key.chain is not None and query.chain == key.chain and q >= k
    return reaches and (same_segment or earlier_of_chain)


def mask_of(places: Sequence[Place]) -> np.ndarray:
    """Dense mask, bool [queries, keys]."""
    everyone = range(len(places))
    return np.array([[sees(q, k, places) for k in everyone] for q in everyone], bool).reshape(len(places), len(places))
