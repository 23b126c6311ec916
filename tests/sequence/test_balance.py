"""Context-parallel ranks do equal work in attention and hold equal shares of either expert's rows."""

from collections.abc import Callable

import numpy as np
import pytest

from megabagel.sequence.items import Clip, Item, Latent, Text, Vit, item_tokens
from megabagel.sequence.layout import build_layout, layout_rows
from megabagel.sequence.pack import Pack
from tests.support.strategies import lay_end_to_end

WINDOW, CHUNK = 9216, 64
Kind = Callable[[np.random.Generator], list[Item]]


def ratio(pack: Pack, chunk: int, cp: int) -> tuple[float, int]:
    """(most over mean of visible keys, most minus fewest und chunks) over ranks."""
    layout = build_layout(pack, layout_rows(WINDOW, chunk, cp), chunk, cp)
    visible = np.append(pack.visible_S, 0)
    area = np.array([visible[layout.rank(rank)].sum() for rank in range(cp)])
    return float(area.max() / area.mean()), (max(layout.num_und) - min(layout.num_und)) // chunk


def t2i(rng: np.random.Generator) -> list[Item]:
    return [Text(0, int(rng.integers(5, 60))), Latent(1, *_sides(rng, 8, 24), noised=True)]


def edit(rng: np.random.Generator) -> list[Item]:
    source = _sides(rng, 8, 24)
    clean, seen = Latent(0, *source, noised=False), Vit(0, *_sides(rng, 8, 20))
    return [clean, seen, Text(1, int(rng.integers(5, 60))), Latent(2, *source, noised=True)]


def interleaved(rng: np.random.Generator) -> list[Item]:
    items: list[Item] = []
    for slot in range(0, 6, 2):
        sides = _sides(rng, 6, 14)
        items += [Text(slot, int(rng.integers(10, 150)), loss=True), Latent(slot + 1, *sides, noised=True)]
        items += [Latent(slot + 1, *sides, noised=False), Vit(slot + 1, *_sides(rng, 6, 14))]
    return items[:-2]


def captions(rng: np.random.Generator) -> list[Item]:
    return [Vit(0, *_sides(rng, 15, 35)), Text(1, int(rng.integers(20, 300)), loss=True)]


def words(rng: np.random.Generator) -> list[Item]:
    return [Text(0, int(rng.integers(50, 2500)), loss=True)]


def video(rng: np.random.Generator) -> list[Item]:
    items: list[Item] = [Text(0, int(rng.integers(10, 60)))]
    sides = _sides(rng, 6, 14)
    for group, size in enumerate(rng.integers(1, 4, 4)):
        frames = tuple(Latent(3 * group + i + 1, *sides, noised=True) for i in range(size))
        items.append(Clip(frames, (1,) * int(size), chain=0))
    return items


def _sides(rng: np.random.Generator, low: int, high: int) -> tuple[int, int]:
    rows, cols = rng.integers(low, high + 1, 2)
    return int(rows), int(cols)


def full_window(kinds: list[Kind], seed: int) -> Pack:
    """Samples of the kinds in turn, until one does not fit."""
    rng, samples, used = np.random.default_rng(seed), [], 0
    while True:
        items = kinds[len(samples) % len(kinds)](rng)
        used += sum(item_tokens(item) for item in items)
        if used > WINDOW:
            return lay_end_to_end(samples).pack
        samples.append(items)


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize(
    "kinds",
    [[t2i], [edit], [interleaved], [captions], [words], [video], [t2i, edit, interleaved, captions, words, video]],
)
def test_usual_packs(kinds, cp):
    """Seen: 1.015 at most, with 19 chunks per rank or more."""
    for seed in range(4):
        area, chunks = ratio(full_window(kinds, seed), CHUNK, cp)
        assert area < 1.03
        assert chunks <= 2


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_one_long_document_with_an_image_among_many_small_images(cp):
    """Few latent rows see very many keys, most see few: the former must not crowd the latter off their ranks."""
    small: list[Item] = [Text(0, 8), Latent(1, 8, 8, noised=True)]
    pack = lay_end_to_end([[Text(0, 4000, loss=True), Latent(1, 8, 8, noised=True)], *[small] * 60]).pack
    area, chunks = ratio(pack, 32, cp)
    assert area < 1.02
    assert chunks <= 8  # seen: 7 of 8 ranks; area comes first, and a row costs the same in either expert
