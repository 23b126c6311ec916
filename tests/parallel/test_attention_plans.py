"""Attention plans are made with the batch: where it is made, for what its rank runs."""

import pickle
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from megabagel_kernels.attention.mask import dense_mask

from megabagel.sequence.batch import AttentionPlans, BatchBuilder
from megabagel.sequence.images import vit_images
from megabagel.sequence.rank_rows import RankPlace
from tests.support.grid_run import base_config, batch, on_grid, packs
from tests.support.rank_pool import RankPool

ENGINES = ("host", "flex", "triton")


def leaves(plan: Any) -> Iterator[Any]:
    """Numbers and tensors of a plan, in the order of its fields."""
    if is_dataclass(plan):
        for field in fields(plan):
            yield from leaves(getattr(plan, field.name))
    elif isinstance(plan, tuple | list):
        for item in plan:
            yield from leaves(item)
    else:
        yield plan


def same(a: Any, b: Any) -> bool:
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def engine_of(name: str) -> Any:
    from megabagel_kernels.attention.configs import INTERPRETER
    from megabagel_kernels.attention.engines import HOST, FlexEngine, TritonEngine

    cpu = torch.device("cpu")
    engines = (HOST, FlexEngine(cpu), TritonEngine(cpu, {16: INTERPRETER, 8: INTERPRETER}))
    return next(engine for engine in engines if engine.name == name)


def planned(name: str) -> list[tuple[AttentionPlans, AttentionPlans]]:
    """On this rank of cp 2: the plans of each batch, made here and by a worker's copy of what makes batches."""
    from megabagel.parallel import mesh

    config = on_grid(base_config(), tp=1, pp=1, vpp=1, cp=2)
    batches = BatchBuilder(config, mesh.build(config).place, engine_of(name).plan)
    copy = pickle.loads(pickle.dumps(batches))
    made = packs(config, 0)
    return [(batch(batches, x).plans, pickle.loads(pickle.dumps(batch(copy, x))).plans) for x in made]


@pytest.mark.parametrize("name", ENGINES)
def test_a_worker_makes_the_same_plans(ranks: RankPool, name: str) -> None:
    of_ranks = ranks.run(2, planned, name)
    for here, there in (plans for of_rank in of_ranks for plans in of_rank):
        assert here.vit is not None and same(here, there)
    first, second = (of_rank[0][0].layers for of_rank in of_ranks)
    assert not same(first, second)  # the ranks hold other queries


@pytest.mark.parametrize(
    ("place", "visual_und", "head_dims"),
    [(RankPlace(), True, [16, 8]), (RankPlace(first=False), True, [16]), (RankPlace(), False, [16])],
)
def test_a_rank_plans_for_what_it_runs(place: RankPlace, visual_und: bool, head_dims: list[int]) -> None:
    """Once for all layers, and once for the tower where it stands."""
    config, planned = base_config(), []
    config = replace(config, model=replace(config.model, visual_und=visual_und))
    batches = BatchBuilder(config, place, lambda *args: planned.append(args) or len(planned))
    pack = packs(config, 0)[1]
    plans = batch(batches, pack).plans
    assert [head_dim for _, head_dim in planned] == head_dims
    assert (plans.layers, plans.vit) == (1, 2 if len(head_dims) == 2 else None)
    layout = batches.lay_out(pack).layout
    assert all(map(np.array_equal, vars(planned[0][0]).values(), vars(layout.codes(pack, 0)).values()))
    if plans.vit:
        sizes = [image.rows * image.cols for _, image in vit_images(pack)]
        image_P = np.repeat(np.arange(len(sizes)), sizes)
        assert np.array_equal(dense_mask(planned[1][0]), image_P[:, None] == image_P)
