"""A run that is saved on one grid and goes on on another, as rank functions: states, data order and losses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megabagel.config.schema import CheckpointConfig, Config, RunConfig
from tests.support import grid_run
from tests.support.config_tree import change
from tests.support.grid_run import Harness, base_config, on_grid
from tests.support.small_run import small_config, sources_of

Grid = tuple[int, int, int, int, int]
"""tp, pp, vpp, cp, dp"""
Boxes = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
"""(key, offset, whole shape, numbers) per box of a rank."""
Order = dict[tuple[int, int], list[tuple[str, int, int]]]
"""(source, sample, epoch) of every sample of (step, pack)."""

SAVED, AFTER, PACKS = 2, 5, 6
"""Steps before the checkpoint and after it; packs per step, which one, two and three data-parallel ranks can share."""


@dataclass(frozen=True)
class Life:
    """What a rank saw: the states in the checkpoint, the data that it takes after it, and the losses."""

    boxes: Boxes
    order: Order
    losses: list[float]


def config_on(grid: Grid, folder: Path, **changes: Any) -> tuple[Config, int]:
    """The scenario on a grid, and the number of ranks."""
    tp, pp, vpp, cp, dp = grid
    config = replace(base_config(), run=RunConfig(dir=str(folder)), checkpoint=CheckpointConfig(async_save=False))
    config = change(config, {"train.packs_per_step": PACKS, **{k.replace("__", "."): v for k, v in changes.items()}})
    return on_grid(config, tp, pp, vpp, cp), tp * pp * cp * dp


def write(config: Config, shapes: str | None = None) -> Life:
    """Train SAVED steps, save, train on; the data plan, of the shapes there, is saved along."""
    from megabagel.checkpoint import api

    with _six_packs():
        harness, plan = Harness(config), _plan(shapes)
        for number in range(SAVED):
            harness.step(number)
            if plan:
                plan.next_step()
        state = {"plan": plan.state()} if plan else {"note": "kept"}
        api.save(config, harness.grid, SAVED, tensors_of(harness), state)
        boxes = boxes_of(harness)
        return Life(boxes, _order(plan, harness), _losses(harness))


def read(config: Config, shapes: str | None = None) -> Life:
    """Load the newest checkpoint, and train on."""
    from megabagel.checkpoint import api

    with _six_packs():
        harness, plan = Harness(config), _plan(shapes)
        folder = api.find(config, harness.grid)
        assert folder is not None
        step, state = api.read(folder, config)
        assert step == SAVED
        if plan:
            plan.load_state(state["plan"])
        api.load(folder, tensors_of(harness))
        harness.optimizer.after_load(step)
        boxes = boxes_of(harness)
        return Life(boxes, _order(plan, harness), _losses(harness))


@contextmanager
def _six_packs() -> Iterator[None]:
    """The scenario has four packs per step: two of a later step are added."""
    four = grid_run.packs
    with mock.patch.object(grid_run, "packs", lambda config, step: [*four(config, step), *four(config, step + 20)[:2]]):
        yield


def _plan(shapes: str | None) -> Any:
    from megabagel.data.plan.global_plan import GlobalPlan

    if shapes is None:
        return None
    config = change(small_config(Path(shapes)), {"train.packs_per_step": PACKS})
    return GlobalPlan(sources_of(config), config)


def _order(plan: Any, harness: Harness) -> Order:
    """The share of this data-parallel rank in the steps to come."""
    found = {}
    for step in (plan.next_step() for _ in range(AFTER if plan else 0)):
        for number in step.share(harness.grid.dp.rank, harness.grid.dp.size):
            keys = [visit.key for visit in step.packs[number].visits]
            found[step.number, number] = [(key.source, key.sample, key.epoch) for key in keys]
    return found


def _losses(harness: Harness) -> list[float]:
    return [harness.step(number)["total"] for number in range(SAVED, SAVED + AFTER)]


def tensors_of(harness: Harness) -> dict[str, Any]:
    """This rank's boxes."""
    from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors

    stages = [chunk.module for chunk in harness.optimizer.chunks]
    shards = optimizer_shards(harness.optimizer.distributed, harness.optimizer.ema)
    return sharded_tensors(stages, shards, harness.grid)


def boxes_of(harness: Harness) -> Boxes:
    """Copies of those that this rank writes."""
    return [
        (tensor.key, tensor.global_offset, tensor.global_shape, tensor.data.numpy().copy())
        for tensor in tensors_of(harness).values()
        if not any(tensor.replica_id)
    ]


def whole(lives: list[Life]) -> dict[str, np.ndarray]:
    """Whole tensors from every rank's boxes, each number exactly once."""
    found: dict[str, np.ndarray] = {}
    times: dict[str, np.ndarray] = {}
    for key, offset, shape, numbers in (box for life in lives for box in life.boxes):
        place = tuple(slice(at, at + size) for at, size in zip(offset, numbers.shape, strict=True))
        found.setdefault(key, np.full(shape, np.nan, np.float32))[place] = numbers
        times.setdefault(key, np.zeros(shape, int))[place] += 1
    for key, count in times.items():
        assert (count == 1).all(), f"{key}: a number is held {count.max()} times, another {count.min()} times"
    return found


def whole_tensors(folder: Path) -> dict[str, Any]:
    """Empty whole tensors for everything in a checkpoint."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megabagel.checkpoint.reader import Stored

    return {
        key: ShardedTensor(
            key=key,
            data=torch.full(entry.shape, torch.nan, dtype=entry.dtype),
            dtype=entry.dtype,
            local_shape=entry.shape,
            global_shape=entry.shape,
            global_offset=(0,) * len(entry.shape),
            axis_fragmentations=None,
        )
        for key, entry in Stored(folder).index.items()
    }
