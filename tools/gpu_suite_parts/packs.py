"""Packs like those of BAGEL's training stages, from keyed draws, and the mask in the order of a layer's rows.

Letters: S tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from megabagel_kernels.attention.mask import AttentionCodes

from megabagel.sequence.items import Item, Latent, Text, Vit, item_tokens
from megabagel.sequence.keys import SampleKey, generator
from megabagel.sequence.layout import build_layout, layout_rows
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.sample import Dropout, plan_sample

Draw = np.random.Generator

CHUNK = 128
"""Rows that a layout deals out together."""

MISSES = 20
"""Samples in a row that do not fit, after which a pack counts as full."""


def t2i_1024(draw: Draw) -> list[Item]:
    """A caption and an image of 1024 x 1024 pixels."""
    return [Text(0, int(draw.integers(40, 300))), Latent(1, 64, 64, noised=True)]


def t2i(draw: Draw) -> list[Item]:
    """A caption and an image of 512 to 1024 pixels a side."""
    return [Text(0, int(draw.integers(40, 300))), Latent(1, *_sides(draw, 32, 65), noised=True)]


def edit(draw: Draw) -> list[Item]:
    """The source image twice, an instruction, the result."""
    rows, cols = _sides(draw, 32, 65)
    source = [Latent(0, rows, cols, noised=False), Vit(0, *_sides(draw, 27, 71))]
    return [*source, Text(1, int(draw.integers(20, 120))), Latent(2, rows, cols, noised=True)]


def interleaved(draw: Draw) -> list[Item]:
    """Texts and images in turns; all images but the last also stand there as conditions."""
    items: list[Item] = []
    for turn in range(draw.integers(3, 9)):
        rows, cols = _sides(draw, 16, 33)
        items += [Text(4 * turn, int(draw.integers(30, 200))), Latent(4 * turn + 1, rows, cols, noised=True)]
        items += [Latent(4 * turn + 2, rows, cols, noised=False), Vit(4 * turn + 3, *_sides(draw, 16, 28))]
    return items[:-2]


def vlm(draw: Draw) -> list[Item]:
    """One to four images and a text about them."""
    images = [Vit(place, *_sides(draw, 16, 71)) for place in range(draw.choice([1, 1, 1, 2, 4]))]
    return [*images, Text(9, int(draw.integers(60, 1200)), loss=True)]


def text(draw: Draw) -> list[Item]:
    """A document."""
    return [Text(0, int(draw.integers(200, 8000)), loss=True)]


def mix(draw: Draw) -> list[Item]:
    """A sample of pretraining: mostly text to image (BAGEL table 3)."""
    kinds: list[Callable[[Draw], list[Item]]] = [t2i, vlm, interleaved, edit, text]
    return kinds[draw.choice(5, p=[0.6, 0.2, 0.1, 0.05, 0.05])](draw)


def tiny(draw: Draw) -> list[Item]:
    """Every kind of split, for toy runs."""
    image = Latent(0, 3, int(draw.integers(3, 6)), noised=False)
    return [image, Vit(0, 4, 4), Text(1, int(draw.integers(2, 9))), Latent(2, 5, int(draw.integers(3, 6)), noised=True)]


KINDS = {"t2i 1024": t2i_1024, "edit": edit, "interleaved": interleaved, "vlm": vlm, "pretraining mix": mix}


def _sides(draw: Draw, low: int, high: int) -> tuple[int, int]:
    """Rows and columns of an image, within 16:9 of a square."""
    rows = int(draw.integers(low, high))
    return rows, int(np.clip(rows * draw.choice([1, 4 / 3, 3 / 4, 16 / 9, 9 / 16]), low, high - 1))


def fill(samples: Callable[[Draw], list[Item]], tokens: int) -> Pack:
    """A pack of exactly `tokens` tokens: samples as they come, and a text in what is left, as BAGEL fills packs."""
    draw, chosen, left, misses = generator("gpu suite", samples.__name__, tokens), [], tokens, 0
    while misses < MISSES:
        items = samples(draw)
        size = sum(map(item_tokens, items))
        if size > left - 3:  # what is left has to hold a text
            misses += 1
            continue
        chosen.append(items)
        left -= size
    chosen.append([Text(0, left - 2)])
    return pack_of(chosen)


def pack_of(samples: list[list[Item]]) -> Pack:
    """Samples laid end to end."""
    keys = (SampleKey(0, "gpu suite", number, 0) for number in range(len(samples)))
    return build_pack([plan_sample(items, key, Dropout()) for items, key in zip(samples, keys, strict=True)])


@dataclass(frozen=True, eq=False)
class Rows:
    """A pack in the order [und | gen] of a layer's rows, without padding."""

    pack: Pack
    token_S: npt.NDArray[np.int64]  # sequence index of each row
    border: int  # und rows
    codes: AttentionCodes


def rows_of(pack: Pack) -> Rows:
    """The rows as the training loop orders them."""
    layout = build_layout(pack, layout_rows(pack.tokens + CHUNK, CHUNK, 1), CHUNK, 1)
    token_S = layout.token_R[layout.token_R >= 0]
    return Rows(pack, token_S, pack.tokens - pack.tokens_gen, pack.codes.take(token_S, token_S))
