"""2-D ids, the frozen table and the rotary embedding against their plain definitions and the official numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from megabagel.model.positions import apply_rope, rope_tables, sincos_table
from megabagel.sequence.grid import grid_ids


def test_ids_lie_in_the_top_left_corner():
    assert grid_ids(2, 3, 10, interpolate=False).tolist() == [0, 1, 2, 10, 11, 12]
    assert grid_ids(1, 1, 70, interpolate=False).dtype == np.int64


def test_stretched_ids_span_the_table():
    # coordinate i of 2 on a side of 10: 0, 5; of 3: 0, 3, 6
    assert grid_ids(2, 3, 10, interpolate=True).tolist() == [0, 3, 6, 50, 53, 56]


@pytest.mark.parametrize("grid", [5, 12, 64, 70])
def test_stretched_coordinates_count_the_boundaries_passed(grid):
    """Also with both fractions in float32, for every image size: the official wording."""
    boundaries = np.arange(1, grid, dtype=np.float32) / np.float32(grid)
    for n in range(1, grid + 1):
        ids = grid_ids(1, n, grid, interpolate=True)
        exact = [sum(Fraction(k, grid) <= Fraction(i, n) for k in range(1, grid)) for i in range(n)]
        assert ids.tolist() == exact
        coordinates = np.arange(n, dtype=np.float32) / np.float32(n)
        assert ids.tolist() == [int((boundaries <= x).sum()) for x in coordinates]


def test_an_image_larger_than_the_table_is_refused():
    with pytest.raises(AssertionError, match="3 x 11"):
        grid_ids(3, 11, 10, interpolate=False)


def test_table_puts_the_column_first():
    dim, grid, (row, col) = 24, 7, (2, 5)
    line = sincos_table(dim, grid)[row * grid + col].tolist()
    waves = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
    expected = [f(p * w) for p in (col, row) for f in (math.sin, math.cos) for w in waves]
    assert line == pytest.approx(expected, abs=6e-8)
    assert sincos_table(dim, grid).shape == (grid * grid, dim)
    assert sincos_table(dim, grid).dtype == torch.float32


def test_rotation_turns_pairs_of_channels_by_their_angle():
    positions, head_dim, base = torch.tensor([0, 3, 3, 50]), 8, 1e4
    x_TNH = torch.randn(4, 2, head_dim, generator=torch.Generator().manual_seed(0))
    y_TNH = apply_rope(x_TNH, *rope_tables(positions, head_dim, base))
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            turn = complex(math.cos(position * base ** (-i / 4)), math.sin(position * base ** (-i / 4)))
            for n in range(2):
                pair = complex(x_TNH[t, n, i], x_TNH[t, n, i + 4]) * turn
                assert y_TNH[t, n, [i, i + 4]].tolist() == pytest.approx([pair.real, pair.imag], abs=1e-5)


def test_scores_depend_on_distance_only_and_bf16_is_rotated_in_float32():
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(1))

    def score(p: int, r: int) -> float:
        cos_TH, sin_TH = rope_tables(torch.tensor([p, r]), 16, 1e6)
        return float((apply_rope(q, cos_TH[:1], sin_TH[:1]) * apply_rope(k, cos_TH[1:], sin_TH[1:])).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)
    tables = rope_tables(torch.tensor([1000]), 16, 1e6)
    low = q.bfloat16()
    assert torch.equal(apply_rope(low, *tables), apply_rope(low.float(), *tables).bfloat16())


def test_frequencies_in_bf16_are_those_of_the_released_trainer():
    """Up to 1.15 rad of phase at position 1000, at the width of a BAGEL head (docs/bagel.md#precision)."""
    position = torch.tensor([1000])
    exact, rounded = (rope_tables(position, 128, 1e6, precision) for precision in ("fp32", "bf16"))
    turned = torch.atan2(rounded[1], rounded[0]) - torch.atan2(exact[1], exact[0])
    phase = torch.remainder(turned + torch.pi, 2 * torch.pi) - torch.pi
    assert float(phase.abs().max()) == pytest.approx(1.15, abs=0.01)
    first = rope_tables(position, 4, 16.0, "bf16")[0][0]  # frequencies 1 and 1/4 have no error to show
    assert first.tolist() == pytest.approx([math.cos(1000), math.cos(250)] * 2, abs=1e-4)


def test_official_numbers(golden):
    expect, about = golden("prim_01_building_blocks")
    for i, case in enumerate(about["position_ids"]):
        sides = case["height"] // case["patch"], case["width"] // case["patch"], case["max_per_side"]
        for mode, interpolate in (("extrapolate", False), ("interpolate", True)):
            assert grid_ids(*sides, interpolate).tolist() == expect[f"posids/{i}.{mode}"].tolist()
    rows = about["sincos_rows"]
    torch.testing.assert_close(sincos_table(64, 5), expect["sincos/dim64_side5"], rtol=0, atol=6e-8)
    torch.testing.assert_close(sincos_table(3584, 70)[rows], expect["sincos/dim3584_side70_rows"], rtol=0, atol=6e-8)
    for head_dim in (16, 128):
        cos_TH, sin_TH = rope_tables(expect["rope/positions"], head_dim, 1e6)
        torch.testing.assert_close(cos_TH, expect[f"rope/cos_{head_dim}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(sin_TH, expect[f"rope/sin_{head_dim}"], rtol=0, atol=1e-6)
    rotated = apply_rope(expect["rope/q_in"], *rope_tables(torch.tensor([7, 100]), 16, 1e6))
    torch.testing.assert_close(rotated, expect["rope/q_out_pos7_100"], rtol=0, atol=1e-6)
