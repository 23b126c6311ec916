"""The memory model against a real small trainer, category by category."""

import pytest

from megabagel.planner.grid import Grid, Recompute
from tests.support.measured import measured, rows
from tests.support.rank_pool import RankPool

TOLERANCE = 0.10


def grid(
    tp: int, pp: int, cp: int, dp: int, recompute: Recompute = "none", precision: str = "fp32", vpp: int = 1
) -> Grid:
    return Grid(tp, pp, vpp, cp, dp, recompute, precision)  # type: ignore[arg-type]


GRIDS = [
    grid(1, 1, 1, 1),
    grid(2, 1, 1, 1),
    grid(1, 1, 2, 1, "selective"),
    grid(2, 2, 1, 1, "full"),
    grid(1, 2, 1, 2, "selective", "bf16", vpp=2),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_category_is_as_predicted(ranks: RankPool, grid: Grid) -> None:
    for row in rows(grid, ranks.run(grid.gpus, measured, grid)):
        assert abs(row.error) <= TOLERANCE, row


def test_frozen_weights_have_no_gradients_and_moments(ranks: RankPool) -> None:
    freeze = ("llm", "vit", "latent")
    for row in rows(GRIDS[0], ranks.run(1, measured, GRIDS[0], freeze), freeze):
        if row.category != "activations":  # less is kept where nothing learns, which the planner does not claim
            assert abs(row.error) <= TOLERANCE, row
