"""Training on sources of task `reward`: weights of 1 give the run of t2i bit for bit, and grids agree on all others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabagel.config.schema import Config, ResizeConfig, RewardConfig, RunConfig, SourceConfig
from tests.support.cli_harness import metrics
from tests.support.grid_run import on_grid
from tests.support.pictures import file_of, noise
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config
from tests.train.test_resume import train

SIZES = ((48, 32), (32, 48), (50, 70), (32, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with scores of all signs; in `neutral.jsonl` such that every weight is exactly 1 by rule `code`."""
    root = tmp_path_factory.mktemp("judged")
    draw = np.random.default_rng(3)
    lines: dict[str, list[dict[str, Any]]] = {"judged": [], "neutral": []}
    for n in range(12):
        width, height = SIZES[n % 4]
        for kind in ("bad", "good"):
            (root / f"{kind}{n}.png").write_bytes(file_of(noise(width, height, seed=2 * n + (kind == "good"))))
        regions = [
            {"box": [0, 0, int(draw.integers(8, width)), int(draw.integers(8, height))], "score": float(score)}
            for score in draw.uniform(-1, 1, 3).round(2)
        ]
        record = {"image": f"bad{n}.png", "prompt": f"picture {n}", "size": [width, height], "regions": regions}
        pair = {"good_image": f"good{n}.png"} if n % 3 == 0 else {}
        lines["judged"].append({**record, **pair, "layout": float(draw.uniform(-1, 1))})
        lines["neutral"].append({**record, "regions": [], "layout": 1.0})
    for name, records in lines.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def config_of(folder: Path, run: Path, file: str, task: Any = "reward", **reward: Any) -> Config:
    config = small_config(folder, run)
    data = replace(
        config.data,
        sources=(SourceConfig("own", f"{file}.jsonl", task),),
        tokenizer="bytes",
        vae_resize=ResizeConfig(max_size=64, min_size=16),
    )
    train = replace(config.train, steps=3, lr=1e-2)
    return replace(
        config, run=RunConfig(dir=str(run), resume="none"), data=data, train=train, reward=RewardConfig(**reward)
    )


def curve(ranks: RankPool, config: Config, grid: tuple[int, ...] = (1, 1, 1, 1, 1), **changes: Any) -> list[tuple]:
    tp, pp, vpp, cp, dp = grid
    config = replace(config, train=replace(config.train, **changes))
    ranks.run(tp * pp * cp * dp, train, on_grid(config, tp, pp, vpp, cp))
    return [(one["loss_mse"], one["grad_norm"]) for one in metrics(Path(config.run.dir))]


def test_weights_of_one_are_the_run_of_t2i(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    plain = curve(ranks, config_of(folder, tmp_path / "plain", "neutral", "t2i"))
    assert curve(ranks, config_of(folder, tmp_path / "reward", "neutral")) == plain
    halved = curve(ranks, config_of(folder, tmp_path / "half", "neutral", use_layout=False, constraint=0.0))
    assert halved[0][0] == pytest.approx(plain[0][0] / 2, rel=1e-6), "denominators are counts of tokens"


@pytest.mark.parametrize("grid", [(2, 1, 1, 1, 1), (1, 2, 1, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2)])
def test_grids_agree(ranks: RankPool, folder: Path, tmp_path: Path, grid: tuple[int, ...]) -> None:
    """Pairs and single pictures, signed weights below zero, both sizes of packs."""
    rules = {"rule": "paper", "floor": None, "pooling": "area", "constraint": 0.1}
    alone = curve(ranks, config_of(folder, tmp_path / "alone", "judged", **rules))
    np.testing.assert_allclose(curve(ranks, config_of(folder, tmp_path / "grid", "judged", **rules), grid), alone, 2e-4)
    assert alone[0][0] != pytest.approx(alone[2][0], rel=1e-3)


def test_released_normalization(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    """The mean of the means of micro-batches: another number than over the whole step, weighted or not."""
    by_rule = {}
    for rule in ("global_batch", "micro_step"):
        config = config_of(folder, tmp_path / rule, "judged")
        by_rule[rule] = curve(ranks, config, steps=1, packs_per_step=3, loss_normalization=rule)[0][0]
    assert by_rule["global_batch"] != by_rule["micro_step"]
    assert by_rule["global_batch"] == pytest.approx(by_rule["micro_step"], rel=0.2)
