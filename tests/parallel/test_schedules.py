"""Pipeline schedules: against what megatron-core runs, and properties that any schedule has to have."""

from collections.abc import Sequence
from typing import Any

import pytest

from megabagel.config.schema import Config
from megabagel.parallel.schedules import Action, peak_in_flight, schedule
from tests.support.grid_run import PACKS, base_config, on_grid
from tests.support.rank_pool import RankPool


def recorded(config: Config) -> tuple[int, list[str]]:
    """This rank's place in the pipeline, and the passes through its chunks in a training step, as they happened.

    A backward begins where the gradient of a chunk's output is complete: on the wire, or at a loss.
    """
    from torch import Tensor

    from tests.support.grid_run import Harness

    harness = Harness(config)
    seen: list[str] = []
    numbers = [0] * config.parallel.vpp

    def record(action: Action) -> None:
        if str(action) not in seen:  # both losses of a micro-batch begin the same backward
            seen.append(str(action))

    def hook(chunk: int) -> Any:
        def after_forward(_module: object, _inputs: object, output: Any) -> None:
            number, numbers[chunk] = numbers[chunk], numbers[chunk] + 1
            record(Action("F", chunk, number))
            for tensor in [output] if isinstance(output, Tensor) else [output.ce_Q, output.mse_g]:
                tensor.register_hook(lambda _: record(Action("B", chunk, number)))

        return after_forward

    for chunk, stage in enumerate(harness.optimizer.chunks):
        stage.module.register_forward_hook(hook(chunk))
    harness.step(0)
    return harness.grid.pp.rank, seen


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_megatron_core_runs_the_schedule(ranks: RankPool, pp: int, vpp: int) -> None:
    for rank, seen in ranks.run(pp, recorded, on_grid(base_config(), 1, pp, vpp, 1)):
        assert seen == [str(action) for action in schedule(rank, pp, vpp, PACKS)], f"pipeline rank {rank}"


def test_two_stages_by_hand() -> None:
    plain = [" ".join(map(str, schedule(rank, 2, 1, 3))) for rank in range(2)]
    assert plain == ["F0.0 F1.0 B0.0 F2.0 B1.0 B2.0", "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0"]
    last = " ".join(map(str, schedule(1, 2, 2, 2)))
    assert last == "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0"


CASES = [
    *[(pp, 1, m) for pp in range(1, 17) for m in sorted({1, 2, pp - 1, pp, pp + 1, 2 * pp + 1, 64} - {0})],
    *[(pp, vpp, m) for pp in range(2, 17) for vpp in (2, 3, 5) for m in sorted({pp, 2 * pp, 64 // pp * pp}) if m <= 64],
]
"""Pipeline ranks, chunks and micro-batches: fewer than ranks, as many, and many more."""


def test_every_pass_happens_once_and_forward_comes_first() -> None:
    for pp, vpp, m in CASES:
        for rank in range(pp):
            actions = schedule(rank, pp, vpp, m)
            place = {action: at for at, action in enumerate(actions)}
            assert len(place) == len(actions) == 2 * vpp * m, (pp, vpp, m, rank)
            for chunk in range(vpp):
                for number in range(m):
                    assert place[Action("F", chunk, number)] < place[Action("B", chunk, number)], (pp, vpp, m, rank)


def test_no_schedule_waits_for_itself_and_the_bubble_is_the_published_one() -> None:
    """(pp - 1) / (vpp m) of the ideal time, where forward and backward of a chunk take 1 and 2."""
    for pp, vpp, m in CASES:
        ends = run([schedule(rank, pp, vpp, m) for rank in range(pp)], vpp)
        assert ends is not None, (pp, vpp, m)
        assert m < pp or max(ends) == 3 * vpp * m + 3 * (pp - 1), (pp, vpp, m)


def test_a_list_out_of_order_is_a_deadlock() -> None:
    first, second = (schedule(rank, 2, 1, 2) for rank in range(2))
    assert run([first, second[1:] + second[:1]], 1) is None


def test_live_activations_are_bounded_by_the_warm_up() -> None:
    for pp, vpp, m in CASES:
        for rank in range(pp):
            alive = peak_in_flight(schedule(rank, pp, vpp, m), vpp)
            bound = pp - rank if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * pp + 1
            assert sum(alive) == min(bound, vpp * m), (pp, vpp, m, rank)


def run(lists: Sequence[Sequence[Action]], vpp: int) -> list[int] | None:
    """Time at which each rank is done, every action begun as early as its inputs allow; None for a deadlock."""
    pp, stages = len(lists), len(lists) * vpp
    done: dict[tuple[str, int, int], int] = {}
    at, clock = [0] * pp, [0] * pp
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while at[rank] < len(actions):
                kind, chunk, number = actions[at[rank]]
                stage = chunk * pp + rank
                before = stage - 1 if kind == "F" else stage + 1
                needs = (kind, before, number) if 0 <= before < stages else ("F", stage, number)
                if kind == "F" and before < 0:
                    ready = 0
                elif needs not in done:
                    break
                else:
                    ready = done[needs]
                clock[rank] = max(clock[rank], ready) + (1 if kind == "F" else 2)
                done[kind, stage, number] = clock[rank]
                at[rank], moved = at[rank] + 1, True
    return clock if all(place == len(actions) for place, actions in zip(at, lists, strict=True)) else None
