"""A checkpoint from any grid goes on on any other: states bitwise equal, losses as if nothing had happened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabagel.config.schema import CheckpointConfig, Config, RunConfig
from tests.parallel.pool import RankPool
from tests.parallel.scenario import Harness, base_config, on_grid

Boxes = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
"""(key, offset, whole shape, numbers) per box of a rank."""

SAVED, TOTAL = 3, 6
PAIRS = [  # tp, pp, vpp, cp, dp: written, read
    ((1, 1, 1, 1, 1), (2, 2, 1, 1, 1)),
    ((2, 1, 1, 1, 1), (1, 1, 1, 1, 2)),
    ((1, 2, 2, 1, 1), (2, 1, 1, 1, 1)),
    ((1, 1, 1, 1, 2), (1, 2, 2, 1, 1)),
    ((2, 1, 1, 2, 1), (1, 2, 1, 1, 2)),
    ((1, 2, 1, 1, 2), (1, 1, 1, 1, 1)),
]


def _tensors(harness: Harness) -> dict[str, Any]:
    from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors

    stages = [chunk.module for chunk in harness.optimizer.chunks]
    shards = optimizer_shards(harness.optimizer.distributed, harness.optimizer.ema)
    return sharded_tensors(stages, shards, harness.grid)


def _boxes(harness: Harness) -> Boxes:
    return [
        (tensor.key, tensor.global_offset, tensor.global_shape, tensor.data.numpy().copy())
        for tensor in _tensors(harness).values()
        if not any(tensor.replica_id)
    ]


def write(config: Config) -> tuple[Boxes, list[dict[str, float]]]:
    """Train to step SAVED, save, train on to TOTAL; the states saved and the later losses."""
    from megabagel.checkpoint import store

    harness = Harness(config)
    for number in range(SAVED):
        harness.step(number)
    store.save(config, harness.grid, SAVED, _tensors(harness), {"note": "kept"})
    saved = _boxes(harness)
    return saved, [harness.step(number) for number in range(SAVED, TOTAL)]


def read(config: Config) -> tuple[Boxes, list[dict[str, float]]]:
    """Load, and train on; the states loaded and the losses."""
    from megabagel.checkpoint import store

    harness = Harness(config)
    folder = store.find(config)
    assert folder is not None
    step, state = store.read(folder, config)
    assert (step, state) == (SAVED, {"note": "kept"})
    store.load(folder, _tensors(harness))
    harness.optimizer.after_load(step)
    loaded = _boxes(harness)
    return loaded, [harness.step(number) for number in range(SAVED, TOTAL)]


def _whole(parts: list[Boxes]) -> dict[str, np.ndarray]:
    """Whole tensors from every rank's boxes, each number exactly once."""
    whole: dict[str, np.ndarray] = {}
    times: dict[str, np.ndarray] = {}
    for key, offset, shape, numbers in (box for boxes in parts for box in boxes):
        place = tuple(slice(at, at + size) for at, size in zip(offset, numbers.shape, strict=True))
        whole.setdefault(key, np.full(shape, np.nan, np.float32))[place] = numbers
        times.setdefault(key, np.zeros(shape, int))[place] += 1
    for key, count in times.items():
        assert (count == 1).all(), f"{key}: a number is held {count.max()} times, another {count.min()} times"
    return whole


def _config(grid: tuple[int, ...], folder: Path) -> tuple[Config, int]:
    tp, pp, vpp, cp, dp = grid
    config = replace(base_config(), run=RunConfig(dir=str(folder)), checkpoint=CheckpointConfig(every=3))
    return on_grid(config, tp, pp, vpp, cp), tp * pp * cp * dp


@pytest.mark.parametrize(("written", "opened"), PAIRS)
def test_states_and_losses_survive_another_grid(
    ranks: RankPool, tmp_path: Path, written: tuple[int, ...], opened: tuple[int, ...]
) -> None:
    config, size = _config(written, tmp_path)
    first = ranks.run(size, write, config)
    config, size = _config(opened, tmp_path)
    second = ranks.run(size, read, config)
    before, after = _whole([boxes for boxes, _ in first]), _whole([boxes for boxes, _ in second])
    assert {key.split("/")[0] for key in before} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert "weight/layers.4.attention.gen.k.weight" in before
    assert before.keys() == after.keys()
    for key, expected in before.items():
        assert np.array_equal(after[key], expected), key
    for theirs, mine in zip(first[0][1], second[0][1], strict=True):
        assert mine["total"] == pytest.approx(theirs["total"], rel=1e-5)
