"""A weight per latent token reaches that token's flow loss, on whatever rank its row lies."""

from dataclasses import replace

import numpy as np
import pytest

from megabagel.config.schema import Config, TrainConfig
from megabagel.sequence.rank_rows import LatentWeights
from megabagel.sequence.sample import LATENT
from tests.support.grid_run import Harness, base_config, batch, on_grid, packs
from tests.support.rank_pool import RankPool

GRIDS = {  # tp, pp, cp
    (1, 1, 1): {},
    (2, 1, 2): {},
    (2, 1, 2, "without sp"): {"sp": False},
    (2, 2, 1): {},
}

Found = tuple[list[tuple[int, float, float, float]], tuple[float, float, float]]
"""(latent token, weight, weighted loss, loss) of a rank's rows with the heads; (mse, weighted mse, mse of ones)."""


def weights(pack_number: int, tokens: int) -> np.ndarray:
    """Another one for every token, 0 among them."""
    return np.random.default_rng(pack_number).permutation(tokens).astype(np.float64) / 8


def losses(config: Config, pack_number: int) -> Found:
    """A pack with and without weights; the loss that training divides and sums, too."""
    from megabagel.train.step import Counts

    harness, pack = Harness(config), packs(config, 0)[pack_number]
    weight_L = weights(pack_number, int((pack.kind_S == LATENT).sum()))
    made = [
        batch(harness.batches, pack, given)
        for given in (None, LatentWeights(weight_L), LatentWeights(np.ones_like(weight_L)))
    ]
    inputs = [harness.builder.build(one) for one in made]
    plain, weighted, _ = (harness.runner.evaluate(one) for one in inputs)
    counts = Counts(pack.ce_tokens, pack.mse_tokens)
    copies = harness.runner.fewest_micro_batches
    sums = [harness.runner.losses([one] * copies, [counts] * copies).mse for one in inputs]
    rows = []
    if plain is not None and weighted is not None:
        latent_g = made[1].rows.arrays().latent_g
        noised_L = pack.noised_S[pack.kind_S == LATENT]
        for row, latent in enumerate(latent_g):
            wanted = weight_L[latent] * noised_L[latent] if latent >= 0 else 0.0
            rows.append((int(latent), float(wanted), float(weighted.mse_g[row]), float(plain.mse_g[row])))
    return rows, (sums[0], sums[1], sums[2])


@pytest.fixture(scope="module")
def config() -> Config:
    """The velocity head starts at zero: without an update every loss is that of the target, which tells rows apart."""
    return replace(base_config(), train=replace(TrainConfig(), seed=7, packs_per_step=4))


@pytest.mark.parametrize(("grid", "pack_number"), [*((grid, 3) for grid in GRIDS), ((2, 1, 2), 0)], ids=str)
def test_weights_land_on_their_tokens(ranks: RankPool, config: Config, grid: tuple, pack_number: int) -> None:
    tp, pp, cp = grid[:3]
    found = ranks.run(tp * pp * cp, losses, on_grid(config, tp, pp, 1, cp, **GRIDS[grid]), pack_number)
    pack = packs(config, 0)[pack_number]
    tokens, copies = int((pack.kind_S == LATENT).sum()), 1 if on_rows_split(grid) else tp
    seen = sorted(latent for rows, _ in found for latent, *_ in rows if latent >= 0)
    assert seen == sorted(list(range(tokens)) * copies)
    weight_L, noised_L = weights(pack_number, tokens), pack.noised_S[pack.kind_S == LATENT]
    assert len(pack.latents) > 2 and noised_L.sum() > 10
    by_latent = {latent: row for rows, _ in found for latent, *row in rows if latent >= 0}
    for latent, (weight, weighted, plain) in by_latent.items():
        assert weight == weight_L[latent] * noised_L[latent]
        assert (plain > 0) == noised_L[latent]
        assert weighted == pytest.approx(weight * plain, rel=1e-6)
    assert all(rows_are_zero(rows) for rows, _ in found)
    total = sum(weighted for _, weighted, _ in by_latent.values()) / pack.mse_tokens  # counts do not weigh
    for _, (mse, weighted_mse, mse_of_ones) in found:
        assert weighted_mse == pytest.approx(total, rel=1e-5) and weighted_mse != pytest.approx(mse, rel=0.1)
        assert mse_of_ones == mse


def on_rows_split(grid: tuple) -> bool:
    return grid[0] == 1 or len(grid) == 3


def rows_are_zero(rows: list[tuple[int, float, float, float]]) -> bool:
    """Padding bears no loss."""
    return all(weighted == plain == 0 for latent, _, weighted, plain in rows if latent < 0)
