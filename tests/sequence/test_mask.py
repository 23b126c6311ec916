"""Who sees whom: mask integers against the plain definition (BAGEL section 2.3, figure 15)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.mask import PRIVATE, dense_mask, visible_pairs, visible_per_query

from megabagel.sequence.items import Mode
from megabagel.sequence.pack import mask_codes
from megabagel.sequence.sample import Segment
from tests.support.oracle import Place, mask_of, places_of
from tests.support.strategies import examples, packs, segments

TEXT, FULL, NOISE = Mode.CAUSAL, Mode.FULL, Mode.NOISE


def drawn(codes):
    """The mask as rows of text: x sees, . does not."""
    return ["".join(".x"[int(cell)] for cell in row) for row in np.asarray(dense_mask(codes))]


def test_an_interleaved_sample_and_a_chain():
    """Figure 15: (a) a generated image and its clean copy, (b) two groups of a chain; words before and after."""
    interleaved = [Segment(TEXT, 2), Segment(NOISE, 2), Segment(FULL, 2), Segment(TEXT, 1)]
    chain = [Segment(TEXT, 1), Segment(NOISE, 1, chain=0), Segment(NOISE, 2, chain=0), Segment(TEXT, 1)]
    assert drawn(mask_codes([interleaved, chain])) == [
        "x...........",
        "xx..........",
        "xxxx........",
        "xxxx........",
        "xx..xx......",
        "xx..xx......",
        "xx..xxx.....",
        ".......x....",
        ".......xx...",
        ".......xxxx.",
        ".......xxxx.",
        ".......x...x",
    ]


def test_chains_do_not_meet_even_when_they_alternate_and_share_a_number_with_another_sample():
    alternating = [Segment(NOISE, 1, chain=c) for c in (0, 1, 0, None, 1)]
    assert drawn(mask_codes([alternating, [Segment(NOISE, 1, chain=0)]])) == [
        "x.....",
        ".x....",
        "x.x...",
        "...x..",
        ".x..x.",
        ".....x",
    ]


@examples(700)
@given(st.lists(st.lists(segments(), min_size=1, max_size=7), min_size=1, max_size=4))
def test_any_splits(samples):
    places = [
        Place(number, index, segment.mode, segment.chain)
        for number, sample in enumerate(samples)
        for index, segment in enumerate(sample)
        for _ in range(segment.length)
    ]
    expected, codes = mask_of(places), mask_codes(samples)
    assert np.array_equal(dense_mask(codes), expected)
    assert np.array_equal(visible_per_query(codes), expected.sum(1))
    assert visible_pairs(codes) == expected.sum()


@examples(400)
@given(packs())
def test_any_pack_of_items(pack_drawn):
    pack, _, tokens = pack_drawn
    expected = mask_of(places_of(tokens))
    assert np.array_equal(dense_mask(pack.codes), expected)
    assert np.array_equal(pack.visible_S, expected.sum(1))


@examples(100)
@given(packs())
def test_codes_are_positions_of_public_keys_and_private_numbers_of_noised_ones(pack_drawn):
    """Kernels count on it: public codes grow with the sequence, private ones start at PRIVATE."""
    pack, _, tokens = pack_drawn
    hidden = np.array([token.mode is Mode.NOISE for sample in tokens for token in sample])
    code = np.asarray(pack.codes.key_code)
    assert np.array_equal(code[~hidden], np.flatnonzero(~hidden))
    numbers = code[hidden] - PRIVATE
    groups = {(place.sample, place.segment) for place in places_of(tokens) if place.mode is Mode.NOISE}
    assert set(numbers.tolist()) == set(range(len(groups)))
    for array in (pack.codes.key_code, *pack.codes.of_queries):
        assert array.dtype == np.int32
