"""The dry run: a sound job passes, and planted errors of layout, sharding and exchange are found."""

from dataclasses import replace
from typing import Any

import pytest

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.planner import consistency, fake_rank
from megabagel.planner.dryrun import Outcome, chosen_ranks, dry_run
from megabagel.planner.grid import Grid
from megabagel.planner.tiling import Interval, holes
from megabagel.runtime import cpu_backend
from megabagel.sequence import rank_rows
from tests.support.measured import config_of

WORLD = 64


def config(**parallel: Any) -> Config:
    made = config_of(Grid(2, 2, 1, 2, 8, "none", "bf16"))
    return replace(made, parallel=replace(made.parallel, **parallel), train=replace(made.train, packs_per_step=16))


def rehearsed(plant: str, **parallel: Any) -> Outcome:
    """A dry run with one thing broken."""
    cpu_backend.install()
    with pytest.MonkeyPatch.context() as patch:
        PLANTS[plant](patch)
        return dry_run(config(**parallel), WORLD, "0,17,last")


def _lose_a_chunk(patch: pytest.MonkeyPatch) -> None:
    """The second rank to ask gets a layout whose last chunk of tokens is missing."""
    real, calls = rank_rows.build_layout, []

    def build(*args: Any) -> Any:
        layout = real(*args)
        calls.append(1)
        if len(calls) % 4 == 2:
            layout.token_K[-32:] = -1
        return layout

    patch.setattr(rank_rows, "build_layout", build)


def _move_a_border(patch: pytest.MonkeyPatch) -> None:
    real = rank_rows.build_layout

    def build(*args: Any) -> Any:
        layout = real(*args)
        return replace(layout, num_und=(layout.num_und[0] + 8, *layout.num_und[1:]))

    patch.setattr(rank_rows, "build_layout", build)


def _same_shard_everywhere(patch: pytest.MonkeyPatch) -> None:
    from megabagel.parallel import linears

    real = linears.shard
    patch.setattr(linears, "shard", lambda weight, dim, blocks, rank=0, size=1: real(weight, dim, blocks, 0, size))


def _shift_optimizer_shards(patch: pytest.MonkeyPatch) -> None:
    real = fake_rank._owned

    def owned(optimizer: Any, buffer: Any, bucket: Any, rank: int, size: int) -> Any:
        for weight, start, stop in real(optimizer, buffer, bucket, rank, size):
            yield weight, start, stop - (rank == 3)

    patch.setattr(fake_rank, "_owned", owned)


def _forget_the_target(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(consistency, "to_wire", lambda hidden, *_: hidden.und_uD[:, None])


def _nothing(patch: pytest.MonkeyPatch) -> None:
    """A sound job."""


PLANTS = {
    "nothing": _nothing,
    "lose a chunk": _lose_a_chunk,
    "move a border": _move_a_border,
    "same shard everywhere": _same_shard_everywhere,
    "shift optimizer shards": _shift_optimizer_shards,
    "forget the target": _forget_the_target,
}


@pytest.mark.parametrize("parallel", [{}, {"vpp": 2, "sp": False}], ids=["plain", "interleaved"])
def test_a_sound_job_passes(parallel: dict[str, Any]) -> None:
    outcome = rehearsed("nothing", **parallel)
    assert outcome.findings == ()
    assert "shards tile every parameter exactly once" in outcome.text
    assert "64 ranks can start" in outcome.text


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ("lose a chunk", "layout = "),
        ("move a border", "expected chunks of 32 of both"),
        ("same shard everywhere", "an overlap between rank 0 and rank 1"),
        ("shift optimizer shards", "a gap between rank 3 and rank 4"),
        ("forget the target", "the next stage expects"),
    ],
)
def test_planted_errors_are_found(plant: str, says: str) -> None:
    outcome = rehearsed(plant)
    assert any(says in finding for finding in outcome.findings), outcome.findings[:5]
    assert "findings:" in outcome.text


def test_bad_input() -> None:
    with pytest.raises(UserError, match="one replica takes tp x pp x cp = 8 ranks"):
        dry_run(config(), 60, "0")
    for words in ("64", "-1", "0,x", ""):
        with pytest.raises(UserError, match="expected numbers below 64"):
            chosen_ranks(words, 64)
    assert chosen_ranks("0, 17,last,63", 64) == [0, 17, 63]


def test_holes() -> None:
    assert list(holes("w", 5, [Interval(1, 3, 5), Interval(0, 0, 3)])) == []
    assert "a gap between the start and rank 0 ([0, 1))" in next(holes("w", 5, [Interval(0, 1, 5)]))
    assert "an overlap" in next(holes("w", 5, [Interval(0, 0, 3), Interval(1, 2, 5)]))
    assert "ends at 3, expected 5" in next(holes("w", 5, [Interval(0, 0, 3)]))
    assert "ends at 0, expected 5" in next(holes("w", 5, []))
