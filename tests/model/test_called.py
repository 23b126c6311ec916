"""Every parameter belongs to a module that forward calls.

With overlapped parameter gathering megatron-core waits for a weight in a forward pre-hook of the module that owns it; a
weight that is read without a call would be that of the step before, without an error.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.support.grid_run import Harness, base_config, on_grid
from tests.support.rank_pool import RankPool


def never_called(config: Any) -> list[str]:
    """Names of parameters whose module is not called in a few training steps, on this rank."""
    harness = Harness(config)
    called: set[int] = set()
    for chunk in harness.optimizer.chunks:
        for module in chunk.modules():
            module.register_forward_pre_hook(lambda module, _: called.add(id(module)))
    for number in range(5):
        harness.step(number)
    return [
        name
        for chunk in harness.optimizer.chunks
        for place, module in chunk.named_modules()
        for name in (f"{place}.{own}" for own, _ in module.named_parameters(recurse=False))
        if id(module) not in called
    ]


@pytest.mark.parametrize("variant", ["mot", "moe", "dense"])
def test_no_weight_is_read_without_a_call(ranks: RankPool, variant: str) -> None:
    config = base_config()
    assert ranks.run(1, never_called, replace(config, model=replace(config.model, variant=variant))) == [[]]


def test_nor_on_pipeline_stages_with_split_linears(ranks: RankPool) -> None:
    assert ranks.run(4, never_called, on_grid(base_config(), 2, 2, 1, 1)) == [[]] * 4
