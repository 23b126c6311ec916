"""The integers against the mask's definition in words."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.mask import (
    PRIVATE,
    AttentionCodes,
    check,
    dense_mask,
    visible_pairs,
    visible_per_query,
)

from tests.kernels.packs import Pack, Segment, codes_of, definition, examples, packs, selections


@examples(200)
@given(packs(), st.integers(0, 3), st.data())
def test_codes_mean_the_mask_in_words(pack: Pack, padding: int, data: st.DataObject):
    codes = codes_of(pack).padded(padding)
    expected = np.pad(definition(pack), (0, padding))
    check(codes)
    assert np.array_equal(dense_mask(codes), expected)
    assert np.array_equal(visible_per_query(codes), expected.sum(1))

    queries, keys = data.draw(selections(len(expected))), data.draw(selections(len(expected)))
    part = codes.take(queries, keys)
    assert np.array_equal(dense_mask(part), expected[np.ix_(queries, keys)])
    assert np.array_equal(visible_per_query(part), expected[np.ix_(queries, keys)].sum(1))
    assert visible_pairs(part) == expected[np.ix_(queries, keys)].sum()


def test_padding_is_blind_and_unseen():
    codes = codes_of([[Segment(2, "causal"), Segment(3, "noise")]])
    both = codes.padded(2)
    assert visible_per_query(both).tolist() == [1, 2, 5, 5, 5, 0, 0]
    assert not dense_mask(both)[:, 5:].any()
    assert np.array_equal(dense_mask(both)[:5, :5], dense_mask(codes))


def test_one_sample_of_every_kind():
    """Text, a clean image, two images noised as one, text, then a chain of two frames."""
    images = [Segment(2, "full"), Segment(1, "noise", 2), Segment(1, "noise", 2)]
    chain = [Segment(2, "noise", 0, chained=True), Segment(1, "noise", 1, chained=True)]
    codes = codes_of([[Segment(2, "causal"), *images, Segment(2, "causal"), *chain]])
    rows = ["".join(".x"[cell] for cell in row.astype(int)) for row in dense_mask(codes)]
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
    codes = AttentionCodes(text, nothing, text + 1, nothing, nothing)
    assert visible_pairs(codes) == size * (size + 1) // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a0": np.array([0, 0])}, r"a0: expected a vector of int32, found int64 with shape \(2,\)"),
        ({"key_code": np.zeros((2, 1), np.int32)}, r"key_code: .* found int32 with shape \(2, 1\)"),
        ({"b1": np.zeros(3, np.int32)}, r"b1: expected one entry per query \(2, as a0\), found 3"),
        ({"key_code": np.array([0, -2], np.int32)}, r"key_code\[1\] = -2: expected codes are -1 .* or more"),
        ({"a0": np.array([0, 2], np.int32)}, r"a0\[1\] = 2, a1\[1\] = 1: expected 0 <= a0 <= a1"),
        ({"a0": np.array([-1, 0], np.int32)}, r"a0\[0\] = -1, a1\[0\] = 1: expected 0 <= a0 <= a1"),
        ({"a1": np.array([1, PRIVATE + 1], np.int32)}, rf"a1\[1\] = {PRIVATE + 1}: expected public codes lie below"),
        ({"b0": np.array([0, 1], np.int32)}, r"b0\[1\] = 1, b1\[1\] = 0: expected b0 <= b1"),
        ({"b1": np.array([7, 0], np.int32)}, r"b0\[0\] = 0, b1\[0\] = 7: expected private codes start at"),
    ],
)
def test_broken_codes_are_named(change: dict[str, Any], message: str):
    zero, one = np.zeros(2, np.int32), np.ones(2, np.int32)
    good: dict[str, Any] = {"key_code": zero, "a0": zero, "a1": one, "b0": zero, "b1": zero}
    check(AttentionCodes(**good))
    with pytest.raises(ValueError, match=message):
        check(AttentionCodes(**{**good, **change}))
