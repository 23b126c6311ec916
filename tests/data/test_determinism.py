"""Which samples a step is made of: the same for every number of ranks and workers, and across any stop and start."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabagel.config.schema import Config
from megabagel.data.decode.host import HostEngine
from megabagel.data.load.loader import Loader, Step
from megabagel.data.plan.global_plan import GlobalPlan, Source
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.sequence.rank_rows import RankPlace
from tests.support.batches import batch_builder
from tests.support.config_tree import change
from tests.support.small_run import small_config, sources_of
from tests.support.strategies import examples

STEPS = 40
PACKS = 12
"""Of a step: 1, 2, 3 and 4 ranks share them evenly."""

Seen = list[list[list[Any]]]
"""[step][pack][sample] -> [source, sample, epoch, items that dropout left]."""


@pytest.fixture(scope="module")
def config(shapes: Path) -> Config:
    return change(small_config(shapes), {"train.packs_per_step": PACKS, "data.max_sample_tokens": 95})


@pytest.fixture(scope="module")
def sources(config: Config) -> list[Source]:
    return sources_of(config)


@pytest.fixture(scope="module")
def uncut(config: Config, sources: list[Source]) -> list[tuple[list[Any], dict[str, Any]]]:
    """(samples, state after it) of every step of a run that is never stopped."""
    plan = GlobalPlan(sources, config)
    return [(samples(step.packs), step.state) for step in (plan.next_step() for _ in range(STEPS))]


def samples(packs: Sequence[Any]) -> list[Any]:
    return [[[v.key.source, v.key.sample, v.key.epoch] for v in pack.visits] for pack in packs]


def loader(config: Config, sources: list[Source], rank: int, size: int) -> Loader:
    tokenizer = load_tokenizer(config.data.tokenizer)
    nothing = batch_builder(config, RankPlace(first=False))  # which samples, not their pixels
    return Loader(GlobalPlan(sources, config), tokenizer, HostEngine(), config, nothing, (rank, size))


def filled(step: Step, rank: int, size: int) -> dict[int, list[Any]]:
    """Samples of the batches that a rank was given, by pack."""
    batches = [[[s.key.source, s.key.sample, s.key.epoch] for s in batch.pack.samples] for batch in step.batches]
    return dict(zip(step.plan.share(rank, size), batches, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_together_run_the_same_samples(
    config: Config, sources: list[Source], uncut: list[tuple[list[Any], Any]], size: int
) -> None:
    ranks = [loader(config, sources, rank, size).steps(6) for rank in range(size)]
    for expected, state in uncut[:6]:
        packs: dict[int, list[Any]] = {}
        for rank, steps in enumerate(ranks):
            step = next(steps)
            assert step.plan.state == state
            packs |= filled(step, rank, size)
        assert [packs[number] for number in range(PACKS)] == expected


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_workers_have_no_say(
    config: Config, sources: list[Source], uncut: list[tuple[list[Any], Any]], workers: int
) -> None:
    made = loader(change(config, {"data.workers": workers}), sources, 1, 2)
    for step, (expected, state) in zip(made.steps(6), uncut, strict=False):
        assert step.plan.state == state
        mine = filled(step, 1, 2)
        assert len(mine) == PACKS // 2
        assert mine == {number: expected[number] for number in mine}


def test_a_stop_at_twenty_random_points_changes_nothing(
    config: Config, sources: list[Source], uncut: list[tuple[list[Any], Any]]
) -> None:
    """Every piece of the run has another number of ranks, and starts from the JSON that the one before left."""
    draws = random.Random(0)
    stops = sorted(draws.sample(range(1, STEPS), 20))
    state: dict[str, Any] | None = None
    for start, stop in zip([0, *stops], [*stops, STEPS], strict=True):
        size = draws.choice([1, 2, 3, 4])
        ranks = [loader(config, sources, rank, size) for rank in range(size)]
        for made in ranks if state else []:
            made.plan.load_state(json.loads(json.dumps(state)))
        feeds = [made.steps(STEPS - start) for made in ranks]  # more is prepared than is used
        for expected, after in uncut[start:stop]:
            packs: dict[int, list[Any]] = {}
            for rank, feed in enumerate(feeds):
                step = next(feed)
                packs |= filled(step, rank, size)
            assert [packs[number] for number in range(PACKS)] == expected
            assert step.plan.state == after
            state = step.plan.state
        for feed in feeds:
            feed.close()  # type: ignore[attr-defined]


@examples(15)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 3))
def test_any_cuts_any_window(shapes: Path, sources: list[Source], pieces: list[int], lookahead: int, seed: int) -> None:
    config = change(small_config(shapes), {"data.lookahead": lookahead, "train.seed": seed})
    whole, plan = GlobalPlan(sources, config), GlobalPlan(sources, config)
    for piece in pieces:
        for _ in range(piece):
            one, two = whole.next_step(), plan.next_step()
            assert one == two
        plan = GlobalPlan(sources, config)
        plan.load_state(json.loads(json.dumps(one.state)))


@pytest.mark.slow
def test_kills_change_nothing(config: Config, shapes: Path, tmp_path: Path, uncut: list[tuple[list[Any], Any]]) -> None:
    """Real processes with workers, killed without warning, each time with another number of ranks and workers."""
    draws, done = random.Random(1), 0
    for size, workers in ((1, 1), (3, 2), (2, 0)):
        wanted = done + draws.randint(2, 5)
        run = subprocess.Popen(
            [sys.executable, "-m", "tests.data.test_determinism", str(shapes), str(tmp_path), str(size), str(workers)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *filter(None, sys.path)])},
            cwd=Path(__file__).parents[2],
        )
        while done < wanted:
            assert run.poll() is None
            done = len(list(tmp_path.glob("*.json")))
        run.send_signal(signal.SIGKILL)
        run.wait()
        done = len(list(tmp_path.glob("*.json")))
    for number in range(done):
        found = json.loads((tmp_path / f"{number:03d}.json").read_text())
        assert found == {"packs": uncut[number][0], "state": uncut[number][1]}
    assert done >= 6


def _read(shapes: Path, folder: Path, size: int, workers: int) -> None:
    """Step after step from where `folder` ends, all ranks in this process; a file per finished step."""
    config = change(small_config(shapes), {"train.packs_per_step": PACKS, "data.max_sample_tokens": 95})
    sources = sources_of(config)
    ranks = [loader(change(config, {"data.workers": workers}), sources, rank, size) for rank in range(size)]
    files = sorted(folder.glob("*.json"))
    for made in ranks if files else []:
        made.plan.load_state(json.loads(files[-1].read_text())["state"])
    for number, steps in enumerate(zip(*(made.steps(STEPS) for made in ranks), strict=True), start=len(files)):
        packs: dict[int, list[Any]] = {}
        for rank, step in enumerate(steps):
            packs |= filled(step, rank, size)
        text = json.dumps({"packs": [packs[number] for number in range(PACKS)], "state": steps[0].plan.state})
        (folder / ".part").write_text(text)
        (folder / ".part").rename(folder / f"{number:03d}.json")


if __name__ == "__main__":
    _read(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
