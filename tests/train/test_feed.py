"""Inputs are built when a schedule reaches them, and held no longer than some model chunk needs them."""

from typing import Any

import pytest

from megabagel.train.feed import InputFeed
from tests.support.rank_pool import RankPool


def test_built_on_demand_and_dropped_after_the_last_reader() -> None:
    made: list[str] = []

    def build(batch: Any) -> Any:
        made.append(batch)
        return [batch]

    batches: Any = ["a", "b", "c"]
    feed = InputFeed(build, batches, readers=2)
    assert len(feed) == 3 and made == []
    first = iter(feed)
    assert next(first) == ["a"] and made == ["a"]
    assert next(first) == ["b"] and list(feed._held) == [0, 1]
    second = iter(feed)
    assert [next(second), next(second)] == [["a"], ["b"]] and made == ["a", "b"] and not feed._held
    assert feed[1:] == [["b"], ["c"]] and not feed._held, "a slice is not kept"
    with pytest.raises(IndexError):
        feed[3]


def most_alive(pp: int, vpp: int) -> tuple[int, int]:
    """Micro-batches of a step, and the most of their inputs that exist at once while the schedule runs forward."""
    import gc
    import weakref

    from megabagel.train import step
    from tests.support.grid_run import Harness, base_config, batch, on_grid, packs

    harness = Harness(on_grid(base_config(), 1, pp, vpp, 1))
    made: list[Any] = []
    most = 0
    build = harness.builder.build

    def counted(batch: Any) -> Any:
        nonlocal most
        inputs = build(batch)
        made.append(weakref.ref(inputs))
        gc.collect()
        most = max(most, sum(one() is not None for one in made))
        return inputs

    batches = [batch(harness.batches, pack) for pack in packs(harness.config, 0)]
    feed = InputFeed(counted, batches, len(harness.runner.chunks))
    harness.runner.losses(feed, [step.Counts(1, 1)] * len(batches))
    return len(batches), most


@pytest.mark.parametrize("grid", [(1, 1), (2, 1)])
def test_few_inputs_exist_at_once(ranks: RankPool, grid: tuple[int, int]) -> None:
    for count, most in ranks.run(grid[0], most_alive, *grid):
        assert count >= 4 and most <= 2
