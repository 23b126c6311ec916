"""The integers against the mask's definition in words."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.mask import (
    PRIVATE,
    RANGES,
    AttentionRanges,
    check,
    dense_mask,
    visible_pairs,
    visible_per_query,
)

from tests.kernels.attention.packs import Pack, Segment, definition, examples, packs, ranges_of, selections


@examples(200)
@given(packs(), st.integers(0, 3), st.data())
def test_codes_mean_the_mask_in_words(pack: Pack, padding: int, data: st.DataObject):
    ranges = ranges_of(pack).padded(padding)
    expected = np.pad(definition(pack), (0, padding))
    check(ranges)
    assert np.array_equal(dense_mask(ranges), expected)
    assert np.array_equal(visible_per_query(ranges), expected.sum(1))

    queries, keys = data.draw(selections(len(expected))), data.draw(selections(len(expected)))
    part = ranges.take(queries, keys)
    assert np.array_equal(dense_mask(part), expected[np.ix_(queries, keys)])
    assert np.array_equal(visible_per_query(part), expected[np.ix_(queries, keys)].sum(1))
    assert visible_pairs(part) == expected[np.ix_(queries, keys)].sum()


def test_padding_is_blind_and_unseen():
    ranges = ranges_of([[Segment(2, "causal"), Segment(3, "noise")]])
    both = ranges.padded(2)
    assert visible_per_query(both).tolist() == [1, 2, 5, 5, 5, 0, 0]
    assert not dense_mask(both)[:, 5:].any()
    assert np.array_equal(dense_mask(both)[:5, :5], dense_mask(ranges))


def test_one_sample_of_every_kind():
    """Text, a clean image, two images noised as one, text, then a chain of two frames."""
    images = [Segment(2, "full"), Segment(1, "noise", 2), Segment(1, "noise", 2)]
    chain = [Segment(2, "noise", 0, chained=True), Segment(1, "noise", 1, chained=True)]
    ranges = ranges_of([[Segment(2, "causal"), *images, Segment(2, "causal"), *chain]])
    rows = ["".join(".x"[cell] for cell in row.astype(int)) for row in dense_mask(ranges)]
    assert rows == [
        "x..........",
        "xx.........",
        "xxxx.......",
        "xxxx.......",
        "xxxxxx.....",
        "xxxxxx.....",
        "xxxx..x....",
        "xxxx..xx...",
        "xxxx..xxxx.",
        "xxxx..xxxx.",
        "xxxx..xxxxx",
    ]


def test_counting_needs_no_dense_mask():
    size = 200_000
    text = np.arange(size, dtype=np.int32)
    nothing = np.zeros(size, np.int32)
    ranges = AttentionRanges(text, nothing, text + 1, nothing, nothing)
    assert visible_pairs(ranges) == size * (size + 1) // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"public_start": np.array([0, 0])},
            r"public_start: expected a vector of int32, found int64 with shape \(2,\)",
        ),
        ({"key_code": np.zeros((2, 1), np.int32)}, r"key_code: .* found int32 with shape \(2, 1\)"),
        (
            {"private_stop": np.zeros(3, np.int32)},
            r"private_stop: expected one entry per query \(2, as public_start\), found 3",
        ),
        ({"key_code": np.array([0, -2], np.int32)}, r"key_code\[1\] = -2: expected codes are -1 .* or more"),
        (
            {"public_start": np.array([0, 2], np.int32)},
            r"public_start\[1\] = 2, public_stop\[1\] = 1: expected 0 <= public_start <= public_stop",
        ),
        (
            {"public_start": np.array([-1, 0], np.int32)},
            r"public_start\[0\] = -1, public_stop\[0\] = 1: expected 0 <= ",
        ),
        (
            {"public_stop": np.array([1, PRIVATE + 1], np.int32)},
            rf"public_stop\[1\] = {PRIVATE + 1}: expected public codes are below",
        ),
        (
            {"private_start": np.array([0, 1], np.int32)},
            r"private_start\[1\] = 1, private_stop\[1\] = 0: expected private_start <= private_stop",
        ),
        (
            {"private_stop": np.array([7, 0], np.int32)},
            r"private_start\[0\] = 0, private_stop\[0\] = 7: expected private codes start at",
        ),
    ],
)
def test_broken_codes_are_named(change: dict[str, Any], message: str):
    zero, one = np.zeros(2, np.int32), np.ones(2, np.int32)
    good: dict[str, Any] = {"key_code": zero, **dict(zip(RANGES, (zero, one, zero, zero), strict=True))}
    check(AttentionRanges(**good))
    with pytest.raises(ValueError, match=message):
        check(AttentionRanges(**{**good, **change}))
