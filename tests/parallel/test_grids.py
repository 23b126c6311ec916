"""One loss curve for every grid: tensor, pipeline, interleaved, context and data parallel, alone and together."""

from dataclasses import replace

import pytest

from megabagel.config.schema import Config
from tests.support.grid_run import base_config, curve, on_grid
from tests.support.rank_pool import RankPool

GRIDS = [(1, 2, 2, 1, 1), (2, 1, 1, 2, 1), (1, 2, 1, 2, 2)]  # tp, pp, vpp, cp, dp
MORE_GRIDS = [(2, 1, 1, 1, 1), (1, 2, 1, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2), (2, 2, 1, 1, 1), (2, 2, 1, 2, 1)]

LOSS, NORM = 1e-5, 1e-4
"""Relative tolerances in fp32: sums in another order move the tenth step's loss by about 1e-6."""


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> list[dict[str, float]]:
    """The curve of one rank."""
    return _curve(ranks, base_config(), (1, 1, 1, 1, 1))


def _curve(ranks: RankPool, config: Config, grid: tuple[int, ...], **options: object) -> list[dict[str, float]]:
    tp, pp, vpp, cp, dp = grid
    results = ranks.run(tp * pp * cp * dp, curve, on_grid(config, tp, pp, vpp, cp, **options))
    assert all(result == results[0] for result in results), "ranks disagree on the global losses"
    return results[0]


def _assert_same(
    found: list[dict[str, float]], expected: list[dict[str, float]], loss: float = LOSS, norm: float = NORM
) -> None:
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for key, value in theirs.items():
            tolerance = norm if key == "norm" else loss
            assert mine[key] == pytest.approx(value, rel=tolerance, abs=1e-12), (step, key)


def test_scenario_learns_and_has_the_hard_batches(alone: list[dict[str, float]]) -> None:
    assert alone[3]["mse"] == 0 < alone[3]["ce"]
    assert alone[4]["ce"] == 0 < alone[4]["mse"]
    assert alone[9]["total"] < alone[0]["total"]


@pytest.mark.parametrize(
    "grid",
    [*GRIDS, *(pytest.param(grid, marks=pytest.mark.thorough) for grid in MORE_GRIDS)],
    ids=lambda grid: "tp{}-pp{}-vpp{}-cp{}-dp{}".format(*grid),
)
def test_curve_does_not_depend_on_the_grid(
    ranks: RankPool, alone: list[dict[str, float]], grid: tuple[int, ...]
) -> None:
    _assert_same(_curve(ranks, base_config(), grid), alone)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((2, 1, 1, 1, 1), {"sp": False}),
        pytest.param((2, 1, 1, 2, 1), {"sp": False}, marks=pytest.mark.thorough),
        ((2, 2, 1, 1, 1), {"recompute": "full"}),
        pytest.param((1, 1, 1, 2, 1), {"recompute": "selective"}, marks=pytest.mark.thorough),
        pytest.param((1, 2, 1, 1, 1), {"layer_split": (1, 4)}, marks=pytest.mark.thorough),
        ((1, 2, 2, 1, 1), {"layer_split": (0, 2, 2, 1)}),
    ],
)
def test_curve_does_not_depend_on_options(
    ranks: RankPool, alone: list[dict[str, float]], grid: tuple[int, ...], options: dict[str, object]
) -> None:
    _assert_same(_curve(ranks, base_config(), grid, **options), alone)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"variant": "dense"}, marks=pytest.mark.thorough),
        {"variant": "moe"},
        pytest.param({"visual_und": False, "qkv_bias": False}, marks=pytest.mark.thorough),
        pytest.param({"qk_norm": False}, marks=pytest.mark.thorough),
    ],
)
def test_other_models_do_not_depend_on_the_grid(ranks: RankPool, changes: dict[str, object]) -> None:
    config = base_config()
    config = replace(config, model=replace(config.model, **changes))
    _assert_same(_curve(ranks, config, (2, 2, 1, 1, 1)), _curve(ranks, config, (1, 1, 1, 1, 1)))


@pytest.mark.parametrize(
    "freeze", [("llm", "vit", "latent"), pytest.param(("und",), marks=pytest.mark.thorough)], ids=" ".join
)
def test_freeze_sets_do_not_depend_on_the_grid(ranks: RankPool, freeze: tuple[str, ...]) -> None:
    """With the connector alone, the second pipeline stage has nothing to learn."""
    config = base_config()
    config = replace(config, train=replace(config.train, freeze=freeze))
    _assert_same(_curve(ranks, config, (2, 2, 1, 1, 1)), _curve(ranks, config, (1, 1, 1, 1, 1)))


def test_a_tower_whose_heads_do_not_split_is_whole_on_every_rank(ranks: RankPool) -> None:
    config = base_config()
    config = replace(config, model=replace(config.model, vit=replace(config.model.vit, hidden=36, heads=3)))
    _assert_same(_curve(ranks, config, (2, 1, 1, 1, 1)), _curve(ranks, config, (1, 1, 1, 1, 1)))


def test_the_micro_step_rule_depends_on_how_packs_are_spread(ranks: RankPool) -> None:
    config = base_config()
    config = replace(config, train=replace(config.train, loss_normalization="micro_step"))
    alone, split = (_curve(ranks, config, grid) for grid in ((1, 1, 1, 1, 2), (2, 1, 1, 1, 2)))
    _assert_same(split, alone)
    assert _curve(ranks, config, (1, 1, 1, 1, 1))[0]["ce"] != pytest.approx(alone[0]["ce"], rel=1e-3)


def test_bf16_trains_like_fp32(ranks: RankPool, alone: list[dict[str, float]]) -> None:
    config = replace(base_config(), train=replace(base_config().train, precision="bf16"))
    one, split = _curve(ranks, config, (1, 1, 1, 1, 1)), _curve(ranks, config, (1, 2, 1, 1, 1))
    _assert_same(one, alone, loss=2e-2, norm=5e-2)
    assert split[0]["total"] == one[0]["total"]  # the flow target crosses stages in full precision
    _assert_same(split, one, loss=1e-3, norm=1e-2)
