"""Sources that changed since a checkpoint: grown ones go on exactly, others are refused with what changed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megabagel.config.schema import Config, SourceConfig
from megabagel.data.formats.shards import write_shards
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.errors import UserError
from tests.support.config_tree import change
from tests.support.small_run import small_config, sources_of

Visits = list[tuple[str, int, int]]
"""(source, epoch, sample) in the order of packs."""


def write(root: Path, name: str, first: int, count: int) -> None:
    samples = [(f"n{number:03d}", {"txt": b"word" * (number % 5 + 3)}) for number in range(first, first + count)]
    write_shards(root, name, samples, 100)


def plan_of(root: Path, *names: str, tasks: tuple[str, ...] = ("text", "text")) -> GlobalPlan:
    sources = tuple(SourceConfig(name, f"{name}-*.tar", task) for name, task in zip(names, tasks, strict=False))  # type: ignore[arg-type]
    config: Config = change(small_config(root), {"data.sources": sources, "data.tokenizer": "bytes"})
    return GlobalPlan(sources_of(config), config)


def visits(plan: GlobalPlan, steps: int) -> Visits:
    """Visits of the next steps, in order."""
    return [
        (visit.key.source, visit.key.epoch, visit.key.sample)
        for _ in range(steps)
        for pack in plan.next_step().packs
        for visit in pack.visits
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "a-0", 0, 100)
    write(tmp_path, "b-0", 0, 100)
    return tmp_path


def test_a_grown_source_finishes_its_epoch_and_goes_on_with_all(root: Path) -> None:
    """Source a grows from 100 to 140 samples inside an epoch: before its end nothing differs from a run that never saw
    them; afterwards every epoch holds all 140 once. Source b does not notice."""
    plan = plan_of(root, "a", "b")
    before = visits(plan, 4)
    state = json.loads(json.dumps(plan.state()))
    epoch = plan.cursors["a"][0]
    unchanged = visits(plan, 12)
    write(root, "a-1", 100, 40)
    grown = plan_of(root, "a", "b")
    grown.load_state(state)
    after = visits(grown, 12)

    def of(source: str, seen: Visits, epochs: range) -> list[tuple[int, int]]:
        return [(at, sample) for name, at, sample in seen if name == source and at in epochs]

    everything = range(10**6)
    assert epoch == 0 and of("a", unchanged, range(1, 2))
    assert of("a", after, range(1)) == of("a", unchanged, range(1))
    first = Counter(sample for _, sample in of("a", before + after, range(1)))
    assert first == Counter(range(100))
    second = [sample for _, sample in of("a", after, range(1, 2))]
    assert len(set(second)) == len(second) and max(second) >= 100
    common = min(len(of("b", after, everything)), len(of("b", unchanged, everything)))
    assert sorted(of("b", after, everything)[: common - 12]) == sorted(of("b", unchanged, everything)[: common - 12])


def test_it_may_stop_and_grow_again(root: Path) -> None:
    """Inside one epoch: 100 samples, then 140, then 150; the state says with how many the epoch began."""
    plan = plan_of(root, "a")
    seen = visits(plan, 2)
    assert plan.cursors["a"][0] == 0 and plan.state()["begun"] == {}
    for name, first, count in (("a-1", 100, 40), ("a-2", 140, 10)):
        write(root, name, first, count)
        state = json.loads(json.dumps(plan.state()))
        plan = plan_of(root, "a")
        plan.load_state(state)
        seen += visits(plan, 1)
        assert plan.cursors["a"][0] == 0 and plan.state()["begun"] == {"a": [0, 100]}
    seen += visits(plan, 40)
    assert plan.cursors["a"][0] >= 3 and plan.state()["begun"] == {}
    by_epoch = [Counter(sample for _, at, sample in seen if at == epoch) for epoch in range(3)]
    assert by_epoch == [Counter(range(100)), Counter(range(150)), Counter(range(150))]


def test_progress_is_counted_in_samples_of_the_epoch(root: Path) -> None:
    plan = plan_of(root, "a")
    visits(plan, 2)
    state, place = plan.state(), plan.cursors["a"][1]
    write(root, "a-1", 100, 40)
    grown = plan_of(root, "a")
    grown.load_state(state)
    assert grown.epochs() == plan.epochs() == {"a": place / 100}


def test_other_changes_are_refused(root: Path) -> None:
    plan = plan_of(root, "a", "b")
    state = plan.state()
    write(root, "b-0", 1, 60)
    with pytest.raises(UserError) as caught:
        plan_of(root, "a", "b").load_state(state)
    told = "data.sources: b changed since the checkpoint was written (b: 100 samples, now 60), so its place in the data"
    assert str(caught.value).startswith(told)
    write(root, "b-0", 0, 100)
    plan_of(root, "a", "b").load_state(state)
    with pytest.raises(UserError, match=r"b changed since .* \(b: not in data.sources\)"):
        plan_of(root, "a").load_state(state)
    write(root, "c-0", 0, 5)
    with pytest.raises(UserError, match=r"b, c changed since .* \(b: not in data.sources; c: not in the checkpoint\)"):
        plan_of(root, "a", "c").load_state(state)
    write(root, "a", 200, 5)  # a-000000.tar comes after a-0-000000.tar
    plan_of(root, "a", "b").load_state(state)
    write(root, "a-", 300, 5)  # a--000000.tar comes before it
    with pytest.raises(UserError, match=r"a: 100 samples, now 110\)"):
        plan_of(root, "a", "b").load_state(state)
