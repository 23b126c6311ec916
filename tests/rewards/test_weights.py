"""Scores to token weights: numbers worked out by hand, odd sizes, overlaps, floor, ablations."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from megabagel.config.schema import RewardConfig
from megabagel.rewards.regions import Region, Reward
from megabagel.rewards.weights import global_factor, pooled, reward_map, token_weights

CODE, PAPER = RewardConfig(rule="code"), RewardConfig(rule="paper")
THREE = (Region((0, 0, 3, 2), 0.2), Region((1, 1, 5, 3), -0.8), Region((2, 0, 4, 3), 0.6))
"""On a picture 5 wide and 3 high."""


def test_map_of_the_code_ignores_negative_scores_and_keeps_the_larger() -> None:
    expected = [[0.6, 0.6, 0.8, 0.8, 0.5], [0.6, 0.6, 0.8, 0.8, 0.5], [0.5, 0.5, 0.8, 0.8, 0.5]]
    np.testing.assert_allclose(reward_map(Reward(THREE), (3, 5), CODE), expected, rtol=0, atol=1e-7)


def test_map_of_the_paper_is_signed_and_zero_outside() -> None:
    expected = [[0.2, 0.2, 0.6, 0.6, 0.0], [0.2, -0.8, -0.8, -0.8, -0.8], [0.0, -0.8, -0.8, -0.8, -0.8]]
    np.testing.assert_allclose(reward_map(Reward(THREE), (3, 5), PAPER), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rules", [CODE, PAPER])
def test_order_of_regions_has_no_influence(rules: RewardConfig) -> None:
    opposite = (*THREE, Region((0, 0, 5, 3), 0.8))
    maps = [reward_map(Reward(order), (3, 5), rules) for order in permutations(opposite)]
    for other in maps[1:]:
        np.testing.assert_array_equal(other, maps[0])
    if rules is PAPER:
        assert maps[0][1, 1] == np.float32(-0.8), "of two scores of one size the negative one counts"


def test_alpha_is_the_layout_score_on_0_to_1() -> None:
    assert [global_factor(Reward((), g), CODE) for g in (-1.0, -0.5, 0.0, None, 1.0)] == [0.0, 0.25, 0.5, 0.5, 1.0]
    assert global_factor(Reward((), -1.0), replace(CODE, use_layout=False)) == 1.0


def test_centre_pooling_by_hand() -> None:
    # Two tokens over five pixels: centres at 0.75 and 3.25 of the pixel grid (pixel n has its centre at n).
    row = np.array([[0.0, 1.0, 2.0, 4.0, 8.0]], np.float32)
    np.testing.assert_allclose(pooled(row, (1, 2), "centre"), [[0.75, 4 + 0.25 * 4]], atol=1e-6)
    # Upsampled: positions are clamped to the first and last pixel.
    np.testing.assert_allclose(pooled(row[:, :2], (1, 4), "centre"), [[0, 0.25, 0.75, 1.0]], atol=1e-6)


def test_area_pooling_by_hand() -> None:
    # Two tokens over five pixels: the middle pixel counts half in each.
    row = np.array([[0.0, 1.0, 2.0, 4.0, 8.0]], np.float32)
    np.testing.assert_allclose(pooled(row, (1, 2), "area"), [[(0 + 1 + 1) / 2.5, (1 + 4 + 8) / 2.5]], atol=1e-6)


def test_centre_misses_a_thin_box_that_area_sees() -> None:
    reward = Reward((Region((0, 0, 4, 16), 1.0),), layout=1.0)
    centre, area = (token_weights(reward, (16, 16), (1, 1), replace(CODE, pooling=name)) for name in ("centre", "area"))
    assert centre.reward_L.tolist() == [0.5]
    assert area.reward_L.tolist() == [0.5 * 0.75 + 1.0 * 0.25]
    assert area.total_L.tolist() == [0.625 + 0.5]


def test_tokens_are_row_major_and_boxes_in_pixels_of_the_stored_picture() -> None:
    # A picture of 48 x 32 pixels trained as 3 x 2 tokens and as 6 x 4: the same box, not rescaled.
    reward = Reward((Region((32, 0, 48, 16), 1.0),), layout=0.0)
    weights = token_weights(reward, (32, 48), (2, 3), PAPER)
    assert weights.reward_L.tolist() == [0, 0, 0.5, 0, 0, 0]
    finer = token_weights(reward, (32, 48), (4, 6), PAPER).reward_L.reshape(4, 6)
    assert finer.tolist() == [[0, 0, 0, 0, 0.5, 0.5]] * 2 + [[0] * 6] * 2


def test_floor_bounds_the_sum_of_both_terms() -> None:
    reward = Reward((Region((0, 0, 16, 16), -1.0),), layout=1.0)
    free = token_weights(reward, (16, 32), (1, 2), replace(PAPER, floor=None))
    assert free.total_L.tolist() == [-0.5, 0.5]
    assert token_weights(reward, (16, 32), (1, 2), PAPER).total_L.tolist() == [0.0, 0.5], "the default is 0"
    assert token_weights(reward, (16, 32), (1, 2), replace(PAPER, floor=-0.25)).total_L.tolist() == [-0.25, 0.5]
    assert token_weights(reward, (16, 32), (1, 2), replace(PAPER, floor=None, constraint=0)).total_L.tolist() == [-1, 0]


def test_ablations() -> None:
    reward = Reward((Region((0, 0, 16, 16), 0.2), Region((16, 0, 32, 16), -0.6)), layout=0.5, overall=0.4)

    def weights(reward: Reward = reward, **changes: object) -> list[float]:
        found = token_weights(reward, (16, 32), (1, 2), replace(CODE, **changes))  # type: ignore[arg-type]
        return [round(float(weight), 6) for weight in found.total_L]

    assert weights() == [0.75 * 0.6 + 0.5, 0.75 * 0.5 + 0.5]
    assert weights(level="picture") == [0.75 * 0.7 + 0.5] * 2
    assert weights(replace(reward, overall=None), level="picture", rule="paper") == [0.75 * -0.2 + 0.5] * 2
    assert weights(binary=True) == [0.75 * 1 + 0.5, 0.75 * 0.5 + 0.5]
    assert weights(binary=True, rule="paper", floor=None) == [0.75 + 0.5, -0.75 + 0.5]
    assert weights(use_layout=False) == [1.1, 1.0]
    assert weights(constraint=0.0) == [0.45, 0.375]


def test_a_box_beyond_the_border_counts_inside() -> None:
    wide = Reward((Region((-4, -4, 2, 2), 1.0), Region((4, 2, 99, 99), 1.0), Region((-9, 0, -2, 3), 1.0)))
    expected = np.full((3, 5), 0.5)
    expected[:2, :2] = 1
    expected[2, 4] = 1
    np.testing.assert_array_equal(reward_map(wide, (3, 5), CODE), expected)
