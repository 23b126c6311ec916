"""Flat ranges as boxes: they tile the range exactly, in order."""

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megabagel.checkpoint.slices import boxes


@given(st.data())
def test_boxes_tile_the_range_in_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    stop = data.draw(st.integers(0, prod(shape)))
    start = data.draw(st.integers(0, stop))
    whole = np.arange(prod(shape)).reshape(shape)
    found = []
    for box in boxes(start, stop, shape):
        part = whole[tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))]
        assert part.shape == box.shape
        assert box.at == len(found)
        found.extend(part.ravel())
    assert found == list(range(start, stop))


def test_a_range_of_a_matrix_is_at_most_three_boxes() -> None:
    found = list(boxes(3, 17, (4, 5)))
    assert [(box.offset, box.shape) for box in found] == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
