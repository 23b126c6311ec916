"""Packs like those of BAGEL's training stages, from keyed draws, and the mask in the order of a layer's rows.

`benchmarks/attention_plan.py` measures on the same packs.

Letters: S tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from megabagel_kernels.attention.mask import AttentionRanges

from megabagel.sequence.items import Clip, Item, Latent, Text, Vit, item_tokens
from megabagel.sequence.keys import SampleKey, generator
from megabagel.sequence.layout import build_layout, layout_rows
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.sample import Dropout, plan_sample

Draw = np.random.Generator
Kind = Callable[[Draw], list[Item]]

CHUNK = 128
"""Rows that a layout deals out together."""

MISSES = 20
"""Samples in a row that do not fit, after which a pack counts as full."""


def t2i_1024(draw: Draw) -> list[Item]:
    """A caption and an image of 1024 x 1024 pixels."""
    return [Text(0, int(draw.integers(40, 300))), Latent(1, 64, 64, noised=True)]


def t2i(draw: Draw) -> list[Item]:
    """A caption and an image whose long side has 512 to 1024 pixels."""
    return [Text(0, int(draw.integers(40, 300))), Latent(1, *_sides(draw, 512, 1024, 16), noised=True)]


def edit(draw: Draw) -> list[Item]:
    """The source image twice, an instruction, the result."""
    rows, cols = _sides(draw, 512, 1024, 16)
    source = [Latent(0, rows, cols, noised=False), Vit(0, *_sides(draw, 378, 980, 14))]
    return [*source, Text(1, int(draw.integers(20, 120))), Latent(2, rows, cols, noised=True)]


def interleaved(draw: Draw) -> list[Item]:
    """Texts and images in turns; all images but the last also stand there as conditions."""
    items: list[Item] = []
    for turn in range(int(draw.integers(3, 8))):
        rows, cols = _sides(draw, 256, 512, 16)
        items += [Text(turn, int(draw.integers(30, 200)), loss=True), Latent(turn, rows, cols, noised=True)]
        items += [Latent(turn, rows, cols, noised=False), Vit(turn, *_sides(draw, 224, 378, 14))]
    return items[:-2]


def forcing(draw: Draw) -> list[Item]:
    """A clip in groups of diffusion forcing."""
    frames = [Latent(slot, 32, 32, noised=True) for slot in range(int(draw.integers(3, 8)))]
    return [Text(9, int(draw.integers(30, 200))), *(Clip((frame,), (1,), chain=0) for frame in frames)]


def vlm(draw: Draw) -> list[Item]:
    """One to four images and a text about them."""
    images = [Vit(place, *_sides(draw, 378, 980, 14)) for place in range(draw.choice([1, 1, 2, 4]))]
    return [*images, Text(9, int(draw.integers(60, 1200)), loss=True)]


def text(draw: Draw) -> list[Item]:
    """A document."""
    return [Text(0, int(draw.integers(200, 8000)), loss=True)]


def mix(draw: Draw) -> list[Item]:
    """A sample of pretraining: mostly text to image (BAGEL table 3)."""
    kinds: list[Kind] = [t2i, vlm, interleaved, edit, text]
    return kinds[draw.choice(5, p=[0.6, 0.2, 0.1, 0.05, 0.05])](draw)


def tiny(draw: Draw) -> list[Item]:
    """Every kind of split, for toy runs."""
    image = Latent(0, 3, int(draw.integers(3, 6)), noised=False)
    return [image, Vit(0, 4, 4), Text(1, int(draw.integers(2, 9))), Latent(2, 5, int(draw.integers(3, 6)), noised=True)]


KINDS: dict[str, Kind] = {
    "T2I 1024 x 1024": t2i_1024,
    "T2I, mixed sizes": t2i,
    "editing": edit,
    "interleaved": interleaved,
    "diffusion forcing": forcing,
    "VLM": vlm,
    "text": text,
    "pretraining mix": mix,
}

TIMED = {name: KINDS[name] for name in ("T2I 1024 x 1024", "editing", "interleaved", "VLM", "pretraining mix")}
"""Those worth the time of a GPU."""


def _sides(draw: Draw, low: int, high: int, stride: int) -> tuple[int, int]:
    """Rows and columns of an image of some aspect whose long side has `low` to `high` pixels, `stride` in a token."""
    long, ratio = draw.integers(low, high + 1), draw.choice([1, 1, 3 / 4, 9 / 16])
    sides = int(long // stride), int(long * ratio // stride)
    return sides if draw.random() < 0.5 else sides[::-1]


def fill(kind: Kind, tokens: int, number: int = 0) -> Pack:
    """A pack of exactly `tokens` tokens: samples as they come, and a text in what is left, as BAGEL fills packs.

    number: of the pack, among those of a kind.
    """
    draw, chosen, left, misses = generator("gpu suite", kind.__name__, tokens, number), [], tokens, 0
    while misses < MISSES:
        items = kind(draw)
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
    num_und: int  # und rows
    ranges: AttentionRanges


def rows_of(pack: Pack) -> Rows:
    """The rows as the training loop orders them."""
    layout = build_layout(pack, layout_rows(pack.tokens + CHUNK, CHUNK, 1), CHUNK, 1)
    token_S = layout.token_K[layout.token_K >= 0]
    return Rows(pack, token_S, pack.tokens - pack.tokens_gen, pack.codes.take(token_S, token_S))
