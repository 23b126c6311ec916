"""Attention plans made with the batch: picklable, equal to those made while inputs are built, and used when there."""

import pickle
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from megabagel.sequence.batch import Encoders, PackedBatch
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
    from functools import partial

    from megabagel_kernels.attention.configs import INTERPRETER

    from megabagel.parallel import attention

    engines = {"host": attention.HOST, "flex": attention._flex()}
    triton = partial(attention._plan_triton, configs={16: INTERPRETER, 8: INTERPRETER})
    return engines.get(name) or attention.AttentionEngine("triton", triton, attention.triton_attention)


def planned(name: str) -> list[tuple[PackedBatch, Any, Any]]:
    """On this rank of cp 2: each batch with its plans, and the plans that a worker's copy of the planner makes."""
    from megabagel.parallel import mesh
    from megabagel.parallel.attention_plans import Planner

    config = on_grid(base_config(), tp=1, pp=1, vpp=1, cp=2)
    grid = mesh.build(config)
    planner = Planner.of(config, grid, engine_of(name))
    copy = pickle.loads(pickle.dumps(planner))
    encoders = Encoders(True, grid.cp.rank, grid.cp.size, grid.tp_cp.rank, grid.tp_cp.size)
    made = [batch(config, pack, encoders) for pack in packs(config, 0)]
    return [(x, planner(x).plans, pickle.loads(pickle.dumps(copy(x))).plans) for x in made]


@pytest.mark.parametrize("name", ENGINES)
def test_a_worker_makes_the_same_plans(ranks: RankPool, name: str) -> None:
    for of_rank in ranks.run(2, planned, name):
        for found, here, there in of_rank:
            assert found.plans is None and here.vit is not None
            assert same(here, there)
    first, second = (found[0][1].layers for found in ranks.run(2, planned, name))
    assert not same(first, second)  # the ranks hold other queries


def counted(with_plans: bool) -> tuple[list[torch.Tensor], int]:
    """Attention of both kinds from built inputs, and how often the engine planned while they were built."""
    from megabagel.runtime.device import current_device

    from megabagel.parallel import attention, mesh
    from megabagel.parallel.attention_plans import Planner
    from megabagel.parallel.inputs import InputBuilder
    from megabagel.parallel.linears import MegatronLayers
    from megabagel.parallel.megatron import megatron_config
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    config = base_config()
    grid = mesh.build(config)
    calls = []
    engine = replace(attention.HOST, plan=lambda *args: calls.append(1) or attention.HOST.plan(*args))
    factory = MegatronLayers(megatron_config(config), grid)
    from megabagel.model.vae import build_codec

    builder = InputBuilder(config, grid, factory, build_codec(config.model.vae), current_device(), engine)
    one = batch(config, packs(config, 0)[1], Encoders(True, 0, 1, 0, 1))
    one = Planner.of(config, grid, attention.HOST)(one) if with_plans else one
    inputs = builder.build(one)
    assert inputs.vit is not None
    draw = torch.Generator().manual_seed(0)
    outs = []
    for attend, rows, head in (
        (inputs.attend, len(inputs.rope.cos_TH), 16),
        (inputs.vit.attend, len(inputs.vit.grid), 8),
    ):
        outs.append(attend(*(torch.randn(rows, 2, head, generator=draw) for _ in range(3))))
    return outs, len(calls)


def test_plans_that_are_there_are_used(ranks: RankPool) -> None:
    ((made, calls),) = ranks.run(1, counted, False)
    ((given, no_calls),) = ranks.run(1, counted, True)
    assert (calls, no_calls) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(made, given, strict=True))
