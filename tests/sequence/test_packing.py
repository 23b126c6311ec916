"""Which samples form a pack, and which packs a rank gets (docs/bagel.md#packing: none is lost)."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabagel.sequence.packing import choose_pack, deal, turns
from tests.support.strategies import examples

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=30)


def test_the_oldest_is_taken_and_what_fits_after_it():
    assert choose_pack([60, 50, 30, 20, 10], min_tokens=95, max_tokens=100) == [0, 2, 4]
    assert choose_pack([100, 1], min_tokens=90, max_tokens=100) == [0]
    assert choose_pack([30, 30, 30, 30], min_tokens=60, max_tokens=100) == [0, 1]  # closed when the minimum is reached
    assert choose_pack([30, 80], min_tokens=60, max_tokens=100) == [0]  # nothing fits: shorter than wished


@examples(100)
@given(LENGTHS, st.integers(1, 150), st.integers(100, 150))
def test_a_pack_lies_in_the_window_and_is_short_only_if_nothing_fits(lengths, min_tokens, max_tokens):
    chosen = choose_pack(lengths, min_tokens, max_tokens)
    total = sum(lengths[index] for index in chosen)
    assert chosen[0] == 0 and chosen == sorted(set(chosen))
    assert total <= max_tokens
    assert total - lengths[chosen[-1]] < min_tokens  # never goes on after the minimum
    left = [length for index, length in enumerate(lengths) if index not in chosen]
    assert total >= min_tokens or all(total + length > max_tokens for length in left)


def stream(lengths: Sequence[int], lookahead: int, min_tokens: int, max_tokens: int) -> tuple[list[list[int]], int]:
    """Pack a stream through a window that is refilled before each pack.

    Returns the packs as sample numbers, and the most packs that a sample saw made before its own.
    """
    packs: list[list[int]] = []
    window: list[tuple[int, int]] = []  # (sample, packs made when it came)
    coming, longest = iter(range(len(lengths))), 0
    while True:
        while len(window) < lookahead and (number := next(coming, None)) is not None:
            window.append((number, len(packs)))
        if not window:
            return packs, longest
        chosen = choose_pack([lengths[number] for number, _ in window], min_tokens, max_tokens)
        longest = max([longest, *(len(packs) - window[index][1] for index in chosen)])
        packs.append([window[index][0] for index in chosen])
        window = [entry for index, entry in enumerate(window) if index not in chosen]


@examples(300)
@given(st.lists(st.integers(1, 100), max_size=120), st.integers(1, 12), st.integers(1, 100), st.integers(100, 130))
def test_every_sample_is_packed_once_and_waits_a_bounded_time(lengths, lookahead, min_tokens, max_tokens):
    packs, longest = stream(lengths, lookahead, min_tokens, max_tokens)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert longest < lookahead
    assert all(sum(lengths[number] for number in pack) <= max_tokens for pack in packs)


def test_long_samples_are_packed_as_often_as_they_come():
    """The released packer loses samples that do not fit at once; under its fine-tune settings, the long ones."""
    lengths = np.random.default_rng(0).permutation([9000] * 40 + [200] * 400).tolist()
    packs, _ = stream(lengths, lookahead=50, min_tokens=10240, max_tokens=11520)
    assert sorted(number for pack in packs for number in pack) == list(range(440))
    assert sum(any(lengths[number] == 9000 for number in pack) for pack in packs) == 40


def test_packs_are_full_when_the_window_offers_enough():
    lengths = np.random.default_rng(1).integers(100, 4000, 3000).tolist()
    packs, _ = stream(lengths, lookahead=50, min_tokens=32768, max_tokens=36864)
    totals = [sum(lengths[number] for number in pack) for pack in packs]
    assert min(totals[:-2]) >= 32768  # the last ones meet a window that runs dry


@pytest.mark.parametrize(
    ("loads", "bins", "expected"),
    [
        ([9, 7, 6, 5, 4, 3], 2, [[0, 3, 5], [1, 2, 4]]),  # 9+5+3 and 7+6+4
        ([1, 1, 1, 1], 2, [[0, 2], [1, 3]]),
        ([1, 5, 1, 1], 2, [[1, 3], [0, 2]]),  # the last one goes to the heavier bin: the other is full
        ([0, 0], 2, [[0], [1]]),
        ([], 3, [[], [], []]),
        ([2.5], 1, [[0]]),
    ],
)
def test_deal_by_hand(loads, bins, expected):
    assert deal(loads, bins) == expected


@examples(100)
@given(st.integers(1, 6), st.integers(0, 8), st.data())
def test_deal_is_a_partition_with_equal_counts(bins, count, data):
    size = bins * count
    loads = data.draw(st.lists(st.integers(0, 50), min_size=size, max_size=size))
    parts = deal(loads, bins)
    assert [len(part) for part in parts] == [count] * bins
    assert sorted(index for part in parts for index in part) == list(range(size))
    assert all(part == sorted(part) for part in parts)
    assert deal(list(loads), bins) == parts


@examples(100)
@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 6), st.integers(0, 9))
def test_deal_within_a_capacity(loads, bins, spare):
    capacity = -(-len(loads) // bins) + spare
    parts = deal(loads, bins, capacity)
    assert sorted(index for part in parts for index in part) == list(range(len(loads)))
    assert max(len(part) for part in parts) <= capacity


@examples(100)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_without_a_limit_on_counts_no_bin_exceeds_the_mean_by_more_than_one_item(loads, bins):
    parts = deal(loads, bins, capacity=len(loads))
    heaviest = max(sum(loads[index] for index in part) for part in parts)
    assert heaviest <= sum(loads) / bins + max(loads) * (1 - 1 / bins) + 1e-9  # Graham's bound for list scheduling


@examples(200)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_turns_give_every_rank_as_many_packs_and_like_loads_share_a_turn(ranks, count, data):
    loads = data.draw(st.lists(st.floats(0, 100), min_size=ranks * count, max_size=ranks * count))
    dealt = turns(loads, ranks)
    assert sorted(pack for turn in dealt for pack in turn) == list(range(ranks * count))
    assert [len(turn) for turn in dealt] == [ranks] * count
    assert [min(turn) for turn in dealt] == sorted(min(turn) for turn in dealt)
    spans = sorted((min(loads[pack] for pack in turn), max(loads[pack] for pack in turn)) for turn in dealt)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    totals = [sum(loads[turn[rank]] for turn in dealt) for rank in range(ranks)]
    assert max(totals) - min(totals) <= max(loads) + 1e-9, "one pack more than another rank at most"


def test_turns_of_one_rank_keep_the_order_and_ties_go_to_the_first():
    assert turns([3, 9, 1], 1) == [[0], [1], [2]]
    assert turns([5, 5, 5, 5], 2) == [[0, 1], [2, 3]]
    assert turns([1, 9, 8, 2], 2) == [[0, 3], [1, 2]], "the heaviest pack goes with the lightest"
