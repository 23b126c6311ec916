"""Tiles cover exactly the visible pairs, once each, at little cost."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.mask import AttentionRanges, dense_mask, visible_pairs
from megabagel_kernels.attention.tiling import Tile, Tiling, cut_into_tiles

from tests.kernels.attention.packs import Pack, Segment, examples, packs, ranges_of, selections


def keys_of(tile: Tile) -> npt.NDArray[np.int64]:
    """Places of the tile's keys in the key order."""
    return np.concatenate([np.arange(part.start, part.stop) for part in tile.keys])


def area(tiling: Tiling) -> int:
    """Pairs that the tiles compute."""
    return sum((tile.stop - tile.start) * len(keys_of(tile)) // tile.batch for tile in tiling.tiles)


def covered(tiling: Tiling, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """How often each (query, key) pair is computed and not hidden."""
    times = np.zeros(shape, np.int64)
    for tile in tiling.tiles:
        keys = keys_of(tile)
        part = np.ones(((tile.stop - tile.start) // tile.batch, len(keys) // tile.batch), np.int64)
        shown = np.kron(np.eye(tile.batch, dtype=np.int64), part)
        if tile.hidden_ts is not None:
            shown[:, tile.common :] -= tile.hidden_ts
        np.add.at(times, np.ix_(tiling.rows[tile.start : tile.stop], tiling.keys[keys]), shown)
    return times


@examples(300)
@given(packs(longest=40), st.integers(0, 3), st.data())
def test_every_visible_pair_is_computed_once(pack: Pack, padding: int, data: st.DataObject):
    whole = ranges_of(pack).padded(padding)
    ranges = whole.take(data.draw(selections(whole.queries)), data.draw(selections(whole.keys)))
    tiling = cut_into_tiles(ranges)
    assert np.array_equal(covered(tiling, (ranges.queries, ranges.keys)), dense_mask(ranges))

    assert sorted(tiling.rows) == np.flatnonzero(dense_mask(ranges).any(1)).tolist()
    assert sorted(tiling.keys) == np.flatnonzero(ranges.key_code >= 0).tolist()
    assert [tile.start for tile in tiling.tiles] == [0, *(tile.stop for tile in tiling.tiles)][:-1]
    assert not tiling.tiles or tiling.tiles[-1].stop == len(tiling.rows)


def test_an_image_is_one_tile_without_mask_in_any_order():
    ranges = ranges_of([[Segment(50, "causal"), Segment(300, "full"), Segment(400, "noise")], [Segment(256, "full")]])
    order = np.random.default_rng(0).permutation(ranges.queries)
    found = cut_into_tiles(ranges.take(order, order)).tiles
    plain = sorted((tile.stop - tile.start, len(keys_of(tile))) for tile in found if tile.hidden_ts is None)
    assert plain == [(256, 256), (300, 350), (400, 750)]
    assert sum(tile.stop - tile.start for tile in found if tile.hidden_ts is not None) == 50


def test_equal_images_are_one_batch():
    images = [Segment(16, "full")] * 20 + [Segment(9, "full")] * 2 + [Segment(100, "full"), Segment(16, "full")]
    tiles = cut_into_tiles(ranges_of([[image] for image in images]).padded(3)).tiles
    assert (tiles[0].stop, tiles[0].batch, tiles[0].keys, tiles[0].hidden_ts) == (320, 20, (slice(0, 320),), None)
    assert area(Tiling(np.arange(0), np.arange(0), tiles)) <= 20 * 16**2 + (2 * 9) ** 2 + (100 + 16) ** 2


def test_what_only_resembles_equal_images_is_no_batch():
    """Equally many rows on equally many keys, but with keys between them, with private keys, or with causal rows."""
    apart = ranges_of([[Segment(300, "full"), Segment(200, "causal")]] * 2)
    noised = ranges_of([[Segment(300, "full"), Segment(300, "noise")]] * 2)
    halved = ranges_of([[Segment(2, "full")], [Segment(2, "causal")]])
    for ranges in (
        apart.take([*range(300), *range(500, 800)]),
        noised.take([*range(300, 600), *range(900, 1200)]),
        halved.take(None, [0, 2, 3]),
    ):
        tiling = cut_into_tiles(ranges)
        assert np.array_equal(covered(tiling, (ranges.queries, ranges.keys)), dense_mask(ranges))


def test_tiny_samples_share_tiles():
    tiling = cut_into_tiles(ranges_of([[Segment(3, "causal"), Segment(4, "noise")] for _ in range(40)]))
    assert len(tiling.tiles) <= 14


def test_a_long_text_wastes_little_and_stores_no_dense_mask():
    size = 20_000
    text = np.arange(size, dtype=np.int32)
    nothing = np.zeros(size, np.int32)
    ranges = AttentionRanges(text, nothing, text + 1, nothing, nothing)
    tiling = cut_into_tiles(ranges)
    stored = sum(tile.hidden_ts.size for tile in tiling.tiles if tile.hidden_ts is not None)
    assert area(tiling) < 1.03 * visible_pairs(ranges)
    assert stored < 400 * size
    assert len(tiling.tiles) < size // 60


def test_a_mixed_pack_wastes_little():
    draw = np.random.default_rng(1)
    pack = []
    for _ in range(8):
        image = int(draw.choice([64, 100, 144, 256]))
        text = int(draw.integers(20, 200))
        pack += [[Segment(image, "full"), Segment(text, "causal"), Segment(image, "noise")], [Segment(text, "causal")]]
    ranges = ranges_of(pack)
    tiling = cut_into_tiles(ranges)
    assert area(tiling) < 1.25 * visible_pairs(ranges)
    assert len(tiling.tiles) < 60
