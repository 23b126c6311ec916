"""The block schedule against the dense mask, block by block."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention import schedule
from megabagel_kernels.attention.mask import AttentionRanges, dense_mask, visible_pairs
from megabagel_kernels.attention.schedule import EMPTY, FULL, PARTIAL, BlockLists, classify, visited_pairs

from tests.kernels.attention.packs import Pack, Segment, examples, packs, ranges_of, selections

SIZES = [(16, 16), (8, 32), (32, 8), (1, 4), (64, 16)]


def brute_force(mask: npt.NDArray[np.bool_], rows: int, cols: int) -> npt.NDArray[np.int8]:
    """Kinds by looking at each block of the mask; beyond its ends nothing is visible."""
    queries, keys = mask.shape
    whole = np.pad(mask, ((0, -queries % rows), (0, -keys % cols)))
    blocks = whole.reshape(len(whole) // rows, rows, whole.shape[1] // cols, cols)
    return np.where(blocks.all((1, 3)), FULL, np.where(blocks.any((1, 3)), PARTIAL, EMPTY)).astype(np.int8)


@examples(400)
@given(packs(longest=40), st.integers(0, 40), st.sampled_from(SIZES), st.data())
def test_classes_are_exact_for_any_tokens_in_any_order(
    pack: Pack, padding: int, size: tuple[int, int], data: st.DataObject
):
    whole = ranges_of(pack).padded(padding)
    ranges = whole.take(data.draw(selections(whole.queries)), data.draw(selections(whole.keys)))
    assert np.array_equal(classify(ranges, *size), brute_force(dense_mask(ranges), *size))


@examples(200)
@given(packs(longest=20), st.integers(0, 3), st.sampled_from([1, 7, 64, 500]), st.data())
def test_comparing_in_small_steps_changes_nothing(pack: Pack, padding: int, step: int, data: st.DataObject):
    whole = ranges_of(pack).padded(padding)
    ranges = whole.take(data.draw(selections(whole.queries)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "PAIRS_AT_ONCE", step)
        assert np.array_equal(classify(ranges, 8, 8), brute_force(dense_mask(ranges), 8, 8))


@examples(200)
@given(st.integers(0, 9), st.integers(0, 9), st.data())
def test_lists_hold_every_block_once_full_ones_first_and_heaviest_first(height: int, width: int, data: st.DataObject):
    kind, size = st.sampled_from([EMPTY, PARTIAL, FULL]), height * width
    cells = data.draw(st.lists(kind, min_size=size, max_size=size))
    kinds = np.array(cells, np.int8).reshape(height, width)
    lists = BlockLists.of(kinds)
    assert lists.work.dtype == lists.blocks.dtype == np.int32
    assert lists.work.shape == (height, 5)
    assert sorted(lists.work[:, 0]) == list(range(height))
    for block, full_start, full_stop, partial_start, partial_stop in lists.work:
        assert lists.blocks[full_start:full_stop].tolist() == np.flatnonzero(kinds[block] == FULL).tolist()
        assert lists.blocks[partial_start:partial_stop].tolist() == np.flatnonzero(kinds[block] == PARTIAL).tolist()
    assert len(lists.blocks) == np.count_nonzero(kinds) + 1
    full_count, partial_count = (lists.work[:, 2:5:2] - lists.work[:, 1:4:2]).T
    assert np.all(np.diff(full_count + schedule.PARTIAL_COST * partial_count) <= 1e-9)


def test_blocks_cut_short_are_partial_and_padding_costs_nothing():
    ranges = ranges_of([[Segment(40, "full")]])
    assert classify(ranges, 16, 16).tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]
    assert classify(ranges.padded(24), 16, 16).tolist() == [[2, 2, 1, 0], [2, 2, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert visited_pairs(classify(ranges, 16, 16), 16, 16) == 9 * 256


def test_codes_next_to_the_border_between_public_and_private_are_told_apart():
    most, private = 2**30 - 1, 2**30
    keys = np.array([most - 1, most, private, private + 1], np.int32)
    one = np.ones(4, np.int32)
    ranges = AttentionRanges(keys, 0 * one, private * one, private * one, (private + 2) * one)
    assert classify(ranges, 4, 4).tolist() == [[FULL]]


def packed_images(tokens: int) -> AttentionRanges:
    """Many text-to-image samples: a prompt and a noised image of 1,024 tokens each."""
    rng = np.random.default_rng(0)
    pack: list[list[Segment]] = []
    while sum(split.length for segments in pack for split in segments) < tokens:
        pack.append([Segment(int(rng.integers(40, 300)), "causal"), Segment(1024, "noise")])
    return ranges_of(pack)


def test_most_visited_pairs_are_visible():
    ranges = packed_images(8192)
    share = visible_pairs(ranges) / visited_pairs(classify(ranges, 128, 128), 128, 128)
    assert 0.8 < share < 1
