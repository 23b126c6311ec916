"""Tiles cover exactly the visible pairs, once each, at little cost."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.mask import AttentionCodes, dense_mask, visible_pairs
from megabagel_kernels.attention.tiling import Tile, Tiling, cut_into_tiles

from tests.kernels.packs import Pack, Split, codes_of, examples, packs, selections


def keys_of(tile: Tile) -> npt.NDArray[np.int64]:
    """Places of the tile's keys in the key order."""
    return np.concatenate([np.arange(part.start, part.stop) for part in tile.keys])


def area(tiling: Tiling) -> int:
    """Pairs that the tiles compute."""
    return sum((tile.stop - tile.start) * len(keys_of(tile)) for tile in tiling.tiles)


def covered(tiling: Tiling, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """How often each (query, key) pair is computed and not hidden."""
    times = np.zeros(shape, np.int64)
    for tile in tiling.tiles:
        keys = keys_of(tile)
        shown = np.ones((tile.stop - tile.start, len(keys)), np.int64)
        if tile.hidden_RK is not None:
            shown[:, tile.common :] -= tile.hidden_RK
        np.add.at(times, np.ix_(tiling.rows[tile.start : tile.stop], tiling.keys[keys]), shown)
    return times


@examples(300)
@given(packs(longest=40), st.integers(0, 3), st.data())
def test_every_visible_pair_is_computed_once(pack: Pack, padding: int, data: st.DataObject):
    whole = codes_of(pack).padded(padding)
    codes = whole.take(data.draw(selections(whole.queries)), data.draw(selections(whole.keys)))
    tiling = cut_into_tiles(codes)
    assert np.array_equal(covered(tiling, (codes.queries, codes.keys)), dense_mask(codes))

    assert sorted(tiling.rows) == np.flatnonzero(dense_mask(codes).any(1)).tolist()
    assert sorted(tiling.keys) == np.flatnonzero(codes.key_code >= 0).tolist()
    assert [tile.start for tile in tiling.tiles] == [0, *(tile.stop for tile in tiling.tiles)][:-1]
    assert not tiling.tiles or tiling.tiles[-1].stop == len(tiling.rows)


def test_an_image_is_one_tile_without_mask_in_any_order():
    codes = codes_of([[Split(50, "causal"), Split(300, "full"), Split(400, "noise")], [Split(256, "full")]])
    order = np.random.default_rng(0).permutation(codes.queries)
    found = cut_into_tiles(codes.take(order, order)).tiles
    plain = sorted((tile.stop - tile.start, len(keys_of(tile))) for tile in found if tile.hidden_RK is None)
    assert plain == [(256, 256), (300, 350), (400, 750)]
    assert sum(tile.stop - tile.start for tile in found if tile.hidden_RK is not None) == 50


def test_tiny_samples_share_tiles():
    tiling = cut_into_tiles(codes_of([[Split(3, "causal"), Split(4, "noise")] for _ in range(40)]))
    assert len(tiling.tiles) <= 14


def test_a_long_text_wastes_little_and_stores_no_dense_mask():
    size = 20_000
    text = np.arange(size, dtype=np.int32)
    nothing = np.zeros(size, np.int32)
    codes = AttentionCodes(text, nothing, text + 1, nothing, nothing)
    tiling = cut_into_tiles(codes)
    stored = sum(tile.hidden_RK.size for tile in tiling.tiles if tile.hidden_RK is not None)
    assert area(tiling) < 1.03 * visible_pairs(codes)
    assert stored < 400 * size
    assert len(tiling.tiles) < size // 60


def test_a_mixed_pack_wastes_little():
    draw = np.random.default_rng(1)
    pack = []
    for _ in range(8):
        image = int(draw.choice([64, 100, 144, 256]))
        text = int(draw.integers(20, 200))
        pack += [[Split(image, "full"), Split(text, "causal"), Split(image, "noise")], [Split(text, "causal")]]
    codes = codes_of(pack)
    tiling = cut_into_tiles(codes)
    assert area(tiling) < 1.25 * visible_pairs(codes)
    assert len(tiling.tiles) < 60
