"""Phases: who sees them, in what order, and what they are called when something fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megabagel.bench.phases import PHASES
from megabagel.config.schema import Config
from megabagel.runtime import phase as phases
from megabagel.runtime.phase import Progress, phase, phase_of
from tests.support.grid_run import base_config, on_grid
from tests.support.rank_pool import RankPool


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Where this process is in the run, at its start."""
    monkeypatch.setattr(phases, "now", Progress())
    return phases.now


def test_the_innermost_phase_is_shown_and_counted_ones_are_marks(fresh: Progress) -> None:
    with phase("inputs"):
        entered = fresh.since
        with phase("vae", counted=False):
            assert (fresh.phase, fresh.marks) == ("vae", 1)
        assert fresh.phase == "inputs" and fresh.since >= entered > 0
        with phase("forward"):
            assert (fresh.phase, fresh.marks) == ("forward", 2)
    assert (fresh.phase, fresh.marks) == ("start", 2)


def test_an_error_keeps_the_innermost_phase_it_came_from(fresh: Progress) -> None:
    with pytest.raises(ZeroDivisionError) as caught, phase("train"), phase("data"):
        1 / 0  # noqa: B018
    assert phase_of(caught.value) == "data" and fresh.phase == "start"
    assert phase_of(ValueError("raised in no phase")) == "start"


def test_listeners_hear_of_every_phase_even_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    @contextmanager
    def listener(name: str) -> Iterator[None]:
        heard.append(f"+{name}")
        try:
            yield
        finally:
            heard.append(f"-{name}")

    monkeypatch.setattr(phases, "listeners", [listener])
    with pytest.raises(KeyError), phase("a"), phase("b"):
        raise KeyError
    assert heard == ["+a", "+b", "-b", "-a"]


def test_phases_are_ranges_of_a_running_profiler() -> None:
    with phase("before"), torch.profiler.profile() as profile, phase("during"):
        torch.ones(2).sum()
    names = {event.key for event in profile.key_averages()}
    assert "during" in names and "before" not in names


def test_phases_are_nvtx_ranges_under_nsys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(phases, "_NSYS", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with phase("forward"):
        calls.append("inside")
    assert calls == ["forward", "inside", "pop"]


def timed_step(config: Config) -> tuple[dict[str, float], int, list[dict[str, float]]]:
    """Seconds of a step by phase, counted phases in it, and losses of this step and the same without a stopwatch."""
    from megabagel.bench.phases import by_phase, stopwatch
    from megabagel.parallel import mesh
    from megabagel.runtime import phase as phases
    from tests.support.grid_run import Harness

    losses = [Harness(config).step(0)]
    mesh.teardown()
    harness, before = Harness(config), phases.now.marks
    with stopwatch() as watch:
        losses.append(harness.step(0))
    return by_phase(watch), phases.now.marks - before, losses


@pytest.mark.parametrize(
    ("grid", "absent"),
    [
        ((1, 1, 1, 1), {"pipeline wait"}),
        ((2, 1, 1, 1), {"pipeline wait"}),
        ((1, 2, 1, 1), set()),
        ((1, 2, 2, 1), set()),
        ((1, 1, 1, 2), {"pipeline wait"}),
    ],
    ids=["one rank", "tp", "pp", "vpp", "cp"],
)
def test_the_stopwatch_sees_every_phase_of_a_step(
    ranks: RankPool, grid: tuple[int, int, int, int], absent: set[str]
) -> None:
    """Without data, inputs and optimizer, which the trainer enters."""
    found: list[Any] = ranks.run(grid[0] * grid[1] * grid[3], timed_step, on_grid(base_config(), *grid))
    for rank, (seconds, marks, (plain, timed)) in enumerate(found):
        first = rank == 0 or grid[1] == 1
        expected = {"forward", "backward", "communication", "pipeline wait", "rest"} - absent
        expected |= {"vae", "vit"} if first else set()
        assert tuple(seconds) == PHASES
        assert {name for name, value in seconds.items() if value > 0} == expected, f"rank {rank}"
        assert plain == timed, "waiting for collectives changes no number"
        assert marks == found[0][1], "counted phases are those that every rank enters alike"
